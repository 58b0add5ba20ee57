"""What every refusal of the converter is."""


class ConversionError(ValueError):
    """Something that cannot be converted: which file or tensor, what is there, what is allowed."""
