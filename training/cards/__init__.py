"""Model cards of the bundled models, written from measured files only."""
