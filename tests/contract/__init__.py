"""What every source promises (docs/spec/sources.md), asked of every one of them."""
