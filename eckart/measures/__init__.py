"""One file per measure: it reads, it never writes, and it returns values with estimator, validity and a note."""
