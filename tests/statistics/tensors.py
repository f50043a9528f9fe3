"""Every tensor of statistics by name, so that two of them can be compared."""


def tensors_of(statistics):
    for name, group in statistics.groups.items():
        yield f"{name}/mean", group.input.mean
        yield f"{name}/covariance", group.input.matrix
        for unit, moment in group.gradients.items():
            yield f"{unit} in {name}/gradient mean", moment.covariance.mean
            yield f"{unit} in {name}/gradient covariance", moment.covariance.matrix
            if moment.cross is not None:
                yield f"{unit} in {name}/cross", moment.cross
        for extra, value in group.extras.items():
            yield f"{name}/extra/{extra}", value
