"""What a run needs beside the method: optimizer, checkpoints, output folder, initial weights, logs, reports."""
