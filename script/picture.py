"""Saving of the picture that a plotting tool draws."""


def save(draw, path):
    """Write the matplotlib figure that `draw()` returns as a PNG file, the argument of the tools' flag --output.

    Raises ValueError, before anything is drawn, if `path` does not end in .png, and OSError if it cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {path} is not the name of a PNG file: end it in .png.")
    figure = draw()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise OSError(f"--output {path}: {error.strerror}; choose a place that can be written.") from error
