//! The throw-away servers themselves.
