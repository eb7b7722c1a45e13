"""`turnout report`: what ran in a training run, as tables, JSON and a picture."""
