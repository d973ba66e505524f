"""Train the bundled flow models and the feature classifier, from the raw data.

    python scripts/train_models.py digits  [--minutes 4]
    python scripts/train_models.py fashion [--minutes 30] [--data-dir FOLDER]
    python scripts/train_models.py classifier [--minutes 3]

Conditional flow matching: x_t = (1-t) x_0 + t x_1, loss |v(x_t, t) - (x_1 - x_0)|^2, AdamW, cosine decay, EMA.
Training stops at the time given; the learning rate follows the clock, so it always ends at zero.
"""

import argparse
import math
import time

import torch
from torch import nn
from tqdm import tqdm

from flowkernels.bench import suite
from flowkernels.models.bundled import BUNDLED, load_network, network_notes, save_network
from flowkernels.models.networks import ResidualMLP, UNet

datasets, Classifier = suite.module("quality.datasets"), suite.module("quality.classifier").Classifier


def on_the_clock(minutes: float, optimizer, lr: float, warmup: int = 200):
    """Yield iteration numbers until the time is over, with warm-up and a cosine decay on elapsed time."""
    start, it = time.monotonic(), 0
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (it + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))
        yield it, bar
        bar.update(round(100 * done - bar.n, 1))
        it += 1
    bar.close()


def train_flow(net, images, minutes, batch, lr, out, flip, autocast, go_on):
    torch.manual_seed(0)
    before = 0
    if go_on:
        net.load_state_dict(load_network(out).state_dict())
        before = network_notes(out)["iterations"]
        torch.manual_seed(before)
    net.train()
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    running = None
    for it, bar in on_the_clock(minutes, opt, lr):
        x1 = images[torch.randint(len(images), (batch,))]
        if flip:
            x1 = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x1.flip(-1), x1)
        x0, t = torch.randn_like(x1), (torch.rand(1) + torch.arange(batch) / batch) % 1  # stratified times
        s = t[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            v = net((1 - s) * x0 + s * x1, t)
        loss = (v.float() - (x1 - x0)).square().mean()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        ema.update_parameters(net)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        bar.set_postfix_str(f"it {it} loss {running:.4f}")
    total = before + it + 1
    save_network(ema.module, out, iterations=total, batch=batch, lr=lr, loss=running)
    print(f"{out}: {sum(p.numel() for p in net.parameters()):,} parameters, {total} iterations, loss {running:.4f}")


def train_classifier(minutes, folder, out):
    torch.manual_seed(0)
    images, labels = datasets.fashion("train", folder)
    test, truth = datasets.fashion("t10k", folder)
    net = Classifier()
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    for it, bar in on_the_clock(minutes, opt, 3e-3):
        pick = torch.randint(len(images), (256,))
        x = images[pick]
        x = torch.where(torch.rand(256, 1, 1, 1) < 0.5, x.flip(-1), x)
        loss = nn.functional.cross_entropy(net(x), labels[pick], label_smoothing=0.05)
        opt.zero_grad()
        loss.backward()
        opt.step()
        bar.set_postfix_str(f"it {it} loss {loss.item():.3f}")
    net.eval()
    with torch.no_grad():
        accuracy = (net(test).argmax(1) == truth).float().mean().item()
    save_network(net, out, iterations=it + 1, test_accuracy=accuracy)
    print(f"{out}: test accuracy {accuracy:.4f}, {it + 1} iterations")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["digits", "fashion", "classifier"])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--go-on", action="store_true", help="start from the checkpoint's weights (digits, fashion)")
    parser.add_argument("--data-dir", help="folder of the original Fashion-MNIST idx files, gzipped or not")
    args = parser.parse_args()
    if args.model == "digits":
        out, minutes = BUNDLED["digits"].path, args.minutes or 4
        train_flow(ResidualMLP(), datasets.digits()[0], minutes, 256, 2e-3, out, False, False, args.go_on)
    elif args.model == "fashion":
        images, _ = datasets.fashion("train", args.data_dir)
        out, minutes = BUNDLED["fashion"].path, args.minutes or 30
        train_flow(UNet(), images, minutes, 64, 1e-3, out, True, True, args.go_on)
    else:
        train_classifier(args.minutes or 3, args.data_dir, BUNDLED["fashion"].path.with_name("classifier.safetensors"))


if __name__ == "__main__":
    main()
