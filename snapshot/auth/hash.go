package auth

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/crypto/argon2"
)

// Params is the cost of a hash (RFC 9106).
type Params struct {
	Memory uint32 // KiB
	Time   uint32 // passes
	Lanes  uint8
}

// defaultParams is what OWASP recommends for interactive use: about 20 ms, and 19
// MiB for that long. The monitor pays it, when a guest asks.
var defaultParams = Params{Memory: 19 << 10, Time: 2, Lanes: 1}

// Bounds of what is read from a file, and sizes of what is written, in bytes.
const (
	maxMemory = 1 << 20 // KiB
	maxTime   = 64
	maxLanes  = 64
	saltSize  = 16
	keySize   = 32
	maxHash   = 512
)

// errHash: a hash in the file is not understood.
var errHash = errors.New("not an argon2id hash")

func (p Params) check() error {
	if p.Lanes < 1 || p.Lanes > maxLanes || p.Time < 1 || p.Time > maxTime || p.Memory < 8*uint32(p.Lanes) || p.Memory > maxMemory {
		return fmt.Errorf("%w: cost m=%d,t=%d,p=%d out of range", errHash, p.Memory, p.Time, p.Lanes)
	}
	return nil
}

// hash is the hash of a secret.
type hash struct {
	Params
	salt, key []byte
}

// newHash hashes secret with a fresh salt.
func newHash(secret string, p Params) hash {
	h := hash{Params: p, salt: make([]byte, saltSize)}
	_, _ = rand.Read(h.salt) // never fails
	h.key = argon2.IDKey([]byte(secret), h.salt, p.Time, p.Memory, p.Lanes, keySize)
	return h
}

// matches takes the same time whatever secret is.
func (h hash) matches(secret string) bool {
	key := argon2.IDKey([]byte(secret), h.salt, h.Time, h.Memory, h.Lanes, uint32(len(h.key)))
	return subtle.ConstantTimeCompare(key, h.key) == 1
}

// String is the hash in the PHC format: $argon2id$v=19$m=…,t=…,p=…$salt$key.
func (h hash) String() string {
	b64 := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, h.Memory, h.Time, h.Lanes, b64(h.salt), b64(h.key))
}

// parseHash reads what String wrote.
func parseHash(s string) (h hash, err error) {
	f := strings.Split(s, "$")
	if len(s) > maxHash || len(f) != 6 || f[0] != "" || f[1] != "argon2id" || f[2] != "v="+strconv.Itoa(argon2.Version) {
		return hash{}, fmt.Errorf("%w of version %d", errHash, argon2.Version)
	}
	cost := strings.Split(f[3], ",")
	if len(cost) != 3 {
		return hash{}, fmt.Errorf("%w: cost is not m=…,t=…,p=…", errHash)
	}
	var v [3]uint64
	for i, name := range []string{"m=", "t=", "p="} {
		n, ok := strings.CutPrefix(cost[i], name)
		if v[i], err = strconv.ParseUint(n, 10, 32); !ok || err != nil || strconv.FormatUint(v[i], 10) != n {
			return hash{}, fmt.Errorf("%w: %q where %s is expected", errHash, cost[i], name)
		}
	}
	h.Params = Params{Memory: uint32(v[0]), Time: uint32(v[1]), Lanes: uint8(min(v[2], 255))}
	if err := h.check(); err != nil {
		return hash{}, err
	}
	strict := base64.RawStdEncoding.Strict()
	if h.salt, err = strict.DecodeString(f[4]); err == nil {
		h.key, err = strict.DecodeString(f[5])
	}
	if err != nil || strings.ContainsAny(s, "\r\n") || len(h.salt) < 8 || len(h.salt) > 64 || len(h.key) < 16 || len(h.key) > 64 {
		return hash{}, fmt.Errorf("%w: salt or key", errHash)
	}
	return h, nil
}
