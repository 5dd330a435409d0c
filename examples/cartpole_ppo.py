"""Balance a pole without seeing how fast it moves: recurrent PPO on a masked CartPole.

The policy gets cart position and pole angle only, so it must remember to know the velocities.
Acting is one LSTM step per frame. Training runs a whole rollout in one call: episodes end in the
middle of it, and `reset` keeps state and gradients from crossing their boundaries, where other
libraries loop over time in Python.

    pip install gymnasium
    python examples/cartpole_ppo.py
"""

import argparse
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from lstm_cuda import FusedLSTM

VISIBLE = (0, 2)  # cart position and pole angle; the two velocities are hidden
ENVIRONMENTS = 16
ROLLOUT_STEPS = 128
EPOCHS = 4
MINIBATCHES = 2
DISCOUNT = 0.99
REWARD_SCALE = 1 - DISCOUNT  # so that values lie between 0 and 1
TRACE_DECAY = 0.95  # lambda of generalised advantage estimation
CLIP = 0.2
ENTROPY_WEIGHT = 0.005
VALUE_WEIGHT = 0.5

State = tuple[Tensor, Tensor]


class Policy(nn.Module):
    """An encoder, one LSTM layer, and heads for the action's logits and the value."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.encoder = nn.Sequential(nn.Linear(len(VISIBLE), hidden_size), nn.Tanh())
        self.lstm = FusedLSTM(hidden_size, hidden_size)
        self.actor = nn.Linear(hidden_size, 2)
        self.critic = nn.Linear(hidden_size, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)

    def forward(
        self, observations: Tensor, state: State, reset: Tensor
    ) -> tuple[Categorical, Tensor, State]:
        """Runs any number of steps.

        Args:
            observations: [T, B, 2].
            state: h and c before the first step, each [1, B, hidden_size].
            reset: True where a new episode begins, [T, B] bool.

        Returns:
            The distribution of actions [T, B], values [T, B], and the state after the last step.
        """
        output, state = self.lstm(self.encoder(observations), state, reset=reset)
        return Categorical(logits=self.actor(output)), self.critic(output).squeeze(-1), state

    def initial_state(self) -> State:
        zeros = torch.zeros(1, ENVIRONMENTS, self.hidden_size)
        return zeros, zeros


@dataclass
class Rollout:
    """What a rollout leaves for training; all but `state` are [ROLLOUT_STEPS, ENVIRONMENTS]."""

    state: State  # before the first step
    observations: Tensor  # with a last dimension of 2
    reset: Tensor  # True where the observation is the first of an episode
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor


class Actor:
    """Plays the environments and keeps, between rollouts, where they and the policy stand."""

    def __init__(self, policy: Policy, seed: int) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise SystemExit("the environment is missing: pip install gymnasium") from error
        self.policy = policy
        self.environments: Any = gymnasium.make_vec(
            "CartPole-v1",
            num_envs=ENVIRONMENTS,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
        )
        self.observation = self._visible(self.environments.reset(seed=seed)[0])
        self.reset = torch.ones(ENVIRONMENTS, dtype=torch.bool)
        self.state = policy.initial_state()
        self.episode_steps = torch.zeros(ENVIRONMENTS)
        self.recent_lengths: deque[float] = deque(maxlen=100)

    @staticmethod
    def _visible(observation: Any) -> Tensor:
        return torch.as_tensor(observation, dtype=torch.float32)[:, VISIBLE]

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Plays ROLLOUT_STEPS steps in every environment."""
        begin = self.state
        records = []
        for _ in range(ROLLOUT_STEPS):
            distribution, value, self.state = self.policy(
                self.observation[None], self.state, self.reset[None]
            )
            action = distribution.sample()
            log_prob = distribution.log_prob(action)
            observation, reward, terminated, truncated, _ = self.environments.step(
                action[0].numpy()
            )
            records.append(
                (
                    self.observation,
                    self.reset,
                    action[0],
                    log_prob[0],
                    value[0],
                    REWARD_SCALE * torch.as_tensor(reward, dtype=torch.float32),
                )
            )
            self.observation = self._visible(observation)
            # Reaching the limit of 500 steps is treated like a fall: simple, and rare early on.
            self.reset = torch.as_tensor(terminated | truncated)
            self._count()
        _, value, _ = self.policy(self.observation[None], self.state, self.reset[None])
        observations, reset, actions, log_probs, values, rewards = (
            torch.stack(steps) for steps in zip(*records, strict=True)
        )
        ended = torch.cat([reset[1:], self.reset[None]])
        advantages = advantages_of(rewards, torch.cat([values, value]), ended)
        return Rollout(
            begin, observations, reset, actions, log_probs, advantages, advantages + values
        )

    def _count(self) -> None:
        self.episode_steps += 1
        self.recent_lengths.extend(self.episode_steps[self.reset].tolist())
        self.episode_steps[self.reset] = 0


def advantages_of(rewards: Tensor, values: Tensor, ended: Tensor) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016).

    Args:
        rewards: of each step, [T, B].
        values: of each observation, and of the one after the last step, [T + 1, B].
        ended: True where the episode ended with this step, [T, B].
    """
    advantages = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[0])
    goes_on = DISCOUNT * (~ended).float()
    for t in reversed(range(len(rewards))):
        error = rewards[t] + goes_on[t] * values[t + 1] - values[t]
        following = error + goes_on[t] * TRACE_DECAY * following
        advantages[t] = following
    return advantages


def update(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout) -> None:
    """Several epochs of clipped policy optimisation (Schulman et al. 2017) on one rollout."""
    advantages = (rollout.advantages - rollout.advantages.mean()) / rollout.advantages.std()
    for _ in range(EPOCHS):
        for rows in torch.randperm(ENVIRONMENTS).chunk(MINIBATCHES):
            state = rollout.state[0][:, rows], rollout.state[1][:, rows]
            distribution, values, _ = policy(
                rollout.observations[:, rows], state, rollout.reset[:, rows]
            )
            log_probs = distribution.log_prob(rollout.actions[:, rows])
            ratio = (log_probs - rollout.log_probs[:, rows]).exp()
            gain = torch.minimum(
                ratio * advantages[:, rows],
                ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[:, rows],
            )
            value_loss = nn.functional.mse_loss(values, rollout.returns[:, rows])
            loss = (
                VALUE_WEIGHT * value_loss
                - gain.mean()
                - ENTROPY_WEIGHT * distribution.entropy().mean()
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()


def main(arguments: list[str] | None = None) -> float:
    """Trains, prints and returns the mean length of the last 100 episodes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120_000, help="steps over all environments")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    policy = Policy(options.hidden_size)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, eps=1e-5)
    actor = Actor(policy, options.seed)
    updates = max(1, options.steps // (ROLLOUT_STEPS * ENVIRONMENTS))
    start = time.perf_counter()
    length = 0.0
    for index in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - index / updates)
        update(policy, optimizer, actor.rollout())
        length = sum(actor.recent_lengths) / max(1, len(actor.recent_lengths))
        if (index + 1) % 5 == 0 or index + 1 == updates:
            steps = (index + 1) * ROLLOUT_STEPS * ENVIRONMENTS
            print(f"{steps:7d} steps  mean length of the last 100 episodes {length:6.1f}")
    print(
        f"the pole stays up for {length:.0f} steps on average (a random policy: about 20; "
        f"the limit: 500; {time.perf_counter() - start:.0f} s)"
    )
    return length


if __name__ == "__main__":
    main()
