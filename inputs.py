"""What the user wrote, as far as it can be checked without importing torch."""


class InputError(Exception):
    """Something the user wrote is wrong; the message names it and says what would be right."""


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
