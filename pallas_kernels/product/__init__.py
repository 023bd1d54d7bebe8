"""Products of a step's rows with a weight matrix, with the same bits for any number of rows."""
