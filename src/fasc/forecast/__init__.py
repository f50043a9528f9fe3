"""What an edit will cost before it is made: ½J in nats per token."""
