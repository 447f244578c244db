"""Lists of the labelled images: published ones to download, and random ones drawn from a training folder."""
