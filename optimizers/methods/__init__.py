"""The methods, one page each."""
