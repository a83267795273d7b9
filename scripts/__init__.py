"""The commands beside training and generation, installed as the package `defectfill_scripts`."""
