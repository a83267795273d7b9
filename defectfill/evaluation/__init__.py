"""What generated images are worth: figures of detectors, and the quality of the images."""
