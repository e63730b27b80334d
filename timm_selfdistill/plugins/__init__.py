"""Other frameworks: each module here needs what an extra installs."""
