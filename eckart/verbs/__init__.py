"""What people ask for: each verb is a pure function of a model, a recipe and data. The screen belongs to the command line."""
