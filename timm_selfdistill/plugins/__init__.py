"""Other frameworks: each module here needs an optional extra of the same name."""
