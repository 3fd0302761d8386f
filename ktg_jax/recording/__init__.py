"""Recordings: what a network put out for the batches of a training, on disk to be learned from."""

from ktg_jax.recording.header import Header
from ktg_jax.recording.reader import Recording
from ktg_jax.recording.writer import RecordingWriter

__all__ = ["Header", "Recording", "RecordingWriter"]
