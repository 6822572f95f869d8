"""What happens around training: the run folder, progress, samples, curves and the saved adapter."""
