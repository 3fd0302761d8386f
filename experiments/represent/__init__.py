"""Parts of `experiments.represent`: a teacher's prior, and the student it is for."""
