"""The parts of the pre-flight of a run's images."""
