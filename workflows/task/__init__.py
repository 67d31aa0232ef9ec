"""The task verb: a corpus of problems with known answers, and the recipe that trains and grades on it."""
