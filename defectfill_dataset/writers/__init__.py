"""Writers: datasets to publish, and exports that others train on."""
