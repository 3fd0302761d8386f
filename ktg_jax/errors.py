"""The two errors that a user of the library or the experiments can meet on purpose."""


class InputError(ValueError):
    """Bad input. One line that names the field, the value and what is allowed.

    >>> str(InputError("temperature", 0.0, "a finite number above 0"))
    'temperature: got 0.0; allowed: a finite number above 0'
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: got {value!r}; allowed: {allowed}")


class RunError(RuntimeError):
    """A run with good input that could not go on. One line: what, where, and what was kept.

    >>> raise RunError("step 3, node resnet8-0: loss not finite (nan)")
    Traceback (most recent call last):
    ktg_jax.errors.RunError: step 3, node resnet8-0: loss not finite (nan)
    """
