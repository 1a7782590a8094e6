"""Names of blocks: a chain of SHA-256 digests, so that a name says all tokens up to the end of its block.

    h_0 = SHA256("kvblk1" | len(fingerprint) | fingerprint | scope)
    h_i = SHA256(h_{i-1} | u32le tokens of block i)

The fingerprint names everything that changes KV bytes, the scope who may share them: two scopes share
no name. SHA-256, not a faster hash: whoever finds a collision would read another tenant's context.
"""

import hashlib
import struct


def root_key(fingerprint: bytes, scope: bytes) -> bytes:
    """h_0 of all sequences of one model and one scope."""
    head = b"kvblk1" + struct.pack("<I", len(fingerprint))
    return hashlib.sha256(head + fingerprint + scope).digest()


class Chain:
    """Names and contents of one sequence's full blocks, each computed once."""

    def __init__(self, root: bytes, block_tokens: int) -> None:
        self._root = root
        self._block = struct.Struct(f"<{block_tokens}I")
        self._block_tokens = block_tokens
        self.keys: list[bytes] = []
        self.contents: list[bytes] = []
        """The token ids of each block as u32le."""

    def parent(self, i: int) -> bytes:
        """The name that block i hangs on."""
        return self.keys[i - 1] if i else self._root

    def extend(self, tokens: list[int], blocks: int) -> None:
        """Name the first `blocks` full blocks of `tokens`, whose beginning must be what was named before."""
        size, named = self._block_tokens, len(self.keys)
        key = self.parent(named)
        for start in range(named * size, blocks * size, size):
            content = self._block.pack(*tokens[start : start + size])
            key = hashlib.sha256(key + content).digest()
            self.keys.append(key)
            self.contents.append(content)
