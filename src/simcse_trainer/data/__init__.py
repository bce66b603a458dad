"""Files and Hub data sets to batches."""
