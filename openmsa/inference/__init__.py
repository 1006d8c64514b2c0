"""Text from a model: one prompt at a time, and what each token costs."""

from openmsa.inference.generation import Generation, Sampling, generate
from openmsa.inference.timing import DecodeTime, decode_time

__all__ = ["DecodeTime", "Generation", "Sampling", "decode_time", "generate"]
