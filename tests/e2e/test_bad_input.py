"""Bad input to daemons on a real testnet: one clear line, the right exit code, nobody harmed."""
