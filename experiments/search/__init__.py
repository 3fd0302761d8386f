"""The parts of `experiments.search`: its options, its study, its workers, and its fair ending."""
