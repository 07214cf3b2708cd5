"""What a network makes of inputs, to compare networks by."""

import torch


def outcome(model, t, z, y, precision="fp32"):
    """Velocity, and the gradient of every weight and of z."""
    model.zero_grad()
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        velocity = model(t, z, y)
    velocity.float().square().sum().backward()
    return [velocity.detach(), z.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
