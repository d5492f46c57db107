"""Every method and the official packages on one small model, on equal terms."""
