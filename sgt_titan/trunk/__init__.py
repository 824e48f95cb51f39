"""What a checkpoint's folder says of itself, without torch: which files are the model, how they are quantised, which
family it is of."""
