"""The paper's experiments at a scale that two CPU cores can rerun."""
