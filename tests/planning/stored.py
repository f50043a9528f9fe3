"""What a checkpoint would hold."""


def stored_tensors(model):
    """Every tensor of the state, each once however often it is tied."""
    return list({tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values())


def stored_numbers(model):
    return sum(tensor.numel() for tensor in stored_tensors(model))


def stored_bytes(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(model))
