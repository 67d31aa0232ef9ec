"""The verbs import and export: public checkpoints become runs, and runs become public checkpoints again."""
