"""The moving average of the weights that sampling uses."""

import copy


class EMA:
    """A float32 copy of a model that follows its weights: w_ema <- d_n w_ema + (1 - d_n) w after step n.

    d_n = min(decay, (1 + n) / (10 + n)): the warm-up lets the average forget the random start, so that it is useful
    after hundreds of steps and not only after 1 / (1 - decay). `average` is the model to sample from.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.average = copy.deepcopy(model).float().eval().requires_grad_(False)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        averaged, current = dict(self.average.named_parameters()), dict(model.named_parameters())
        self.averaged = {current[name]: averaged[name] for name in trained}  # what the optimizer's step moves

    def decay_at(self, step):
        """d_n of the update after step n = 0, 1, ..."""
        return min(self.decay, (1 + step) / (10 + step))
