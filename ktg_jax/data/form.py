"""What every image of a data set is brought to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageForm:
    """What every image of a data set is brought to.

    Attributes:
        height: in pixels.
        width: in pixels.
        greyscale: one channel; otherwise RGB.
        resize: images of another size are resized; otherwise they are an error.
        centre: their middle is, in its own proportions; otherwise all of them.
    """

    height: int
    width: int
    greyscale: bool
    resize: bool = False
    centre: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.height, self.width, 1 if self.greyscale else 3
