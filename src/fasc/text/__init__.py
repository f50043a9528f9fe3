"""Files, hub sets, chats, facts and text sampled from the model, as blocks of tokens with a digest."""
