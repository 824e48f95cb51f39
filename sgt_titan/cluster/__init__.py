"""What a run and a scheduler tell each other, through small files in the run's directory. Never imports torch."""
