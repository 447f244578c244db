"""What the tools that draw one picture do with it."""


def save(draw, path):
    """Write the matplotlib figure that `draw()` makes as a PNG.

    Raises ValueError before it is drawn where `path` is not named so, OSError where it cannot be written; both name
    the tools' flag, --output.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {path} is not the name of a PNG: end it in .png.")
    figure = draw()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise OSError(f"--output {path}: {error.strerror}; choose a place that can be written.") from error
