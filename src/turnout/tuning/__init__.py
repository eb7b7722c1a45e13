"""Which config a kernel runs with: candidates, stored configs, the search, and the record of it."""
