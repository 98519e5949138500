"""What the techniques of this family share: units of weights, where they are at home, and how they come and go."""
