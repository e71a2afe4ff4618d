package auth

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// open is a store whose hashes cost nothing.
func open(path string) *Store {
	s := Open(path)
	s.params = Params{Memory: 8, Time: 1, Lanes: 1}
	s.decoy.Params = s.params
	return s
}

func newStore(t testing.TB) *Store {
	return open(filepath.Join(t.TempDir(), "machines", "m", "auth.json"))
}

func TestPrincipals(t *testing.T) {
	s := newStore(t)
	ps, err := s.List()
	require.NoError(t, err)
	assert.Empty(t, ps)
	_, err = s.Verify("ada", "whatever")
	assert.ErrorIs(t, err, ErrDenied)

	made, err := s.Add("ada", "", []string{"save", "restore", "save"})
	require.NoError(t, err)
	assert.Len(t, made, 26)
	given, err := s.Add("bob", "a given secret", []string{All})
	require.NoError(t, err)
	assert.Equal(t, "a given secret", given)
	_, err = s.Add("ada", "", []string{All})
	assert.ErrorIs(t, err, ErrExists)

	// Another process sees the same.
	for _, s := range []*Store{s, open(s.path)} {
		for range 2 { // the second is remembered
			p, err := s.Verify("ada", made)
			require.NoError(t, err)
			assert.Equal(t, "ada", p.Name)
			assert.Equal(t, []string{"restore", "save"}, p.Allow)
			assert.WithinDuration(t, time.Now(), p.Created, time.Hour)
			assert.True(t, p.May("save"))
			assert.False(t, p.May("delete"))
		}
		p, err := s.Verify("bob", given)
		require.NoError(t, err)
		assert.True(t, p.May("delete"))
		for _, c := range [][2]string{{"ada", given}, {"ada", ""}, {"ada", made + "x"}, {"bob", made}, {"eve", made}, {"", ""}, {"ada", strings.Repeat("x", MaxSecret+1)}} {
			_, err = s.Verify(c[0], c[1])
			assert.ErrorIs(t, err, ErrDenied, "%v", c)
		}
		ps, err = s.List()
		require.NoError(t, err)
		require.Len(t, ps, 2)
		assert.Equal(t, "ada", ps[0].Name)
	}
	b, err := os.ReadFile(s.path)
	require.NoError(t, err)
	assert.NotContains(t, string(b), given)
	assert.NotContains(t, string(b), made)
	fi, err := os.Stat(s.path)
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
	fi, err = os.Stat(filepath.Dir(s.path))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o700), fi.Mode().Perm())

	// What an administrator takes away is gone for a machine that had
	// remembered it, and what is added anew has its own secret.
	require.NoError(t, open(s.path).Remove("ada"))
	_, err = s.Verify("ada", made)
	assert.ErrorIs(t, err, ErrDenied)
	again, err := open(s.path).Add("ada", "", []string{"list"})
	require.NoError(t, err)
	_, err = s.Verify("ada", made)
	assert.ErrorIs(t, err, ErrDenied)
	_, err = s.Verify("ada", again)
	assert.NoError(t, err)
	assert.ErrorIs(t, s.Remove("eve"), ErrNotFound)
}

func TestAddRefuses(t *testing.T) {
	s := newStore(t)
	for _, tc := range []struct {
		name, secret string
		allow        []string
	}{
		{"", "", []string{"save"}},
		{"a/b", "", []string{"save"}},
		{"-a", "", []string{"save"}},
		{".a", "", []string{"save"}},
		{"a\nb", "", []string{"save"}},
		{strings.Repeat("a", MaxName+1), "", []string{"save"}},
		{"a", "short", []string{"save"}},
		{"a", strings.Repeat("x", MaxSecret+1), []string{"save"}},
		{"a", "", nil},
		{"a", "", []string{""}},
		{"a", "", []string{"sa ve"}},
	} {
		_, err := s.Add(tc.name, tc.secret, tc.allow)
		assert.ErrorIs(t, err, ErrInvalid, "%+v", tc)
	}
	var many []string
	for i := range MaxRights + 1 {
		many = append(many, fmt.Sprint("op", i))
	}
	_, err := s.Add("a", "", many)
	assert.ErrorIs(t, err, ErrInvalid)
	assert.NoFileExists(t, s.path)
}

func TestTooManyPrincipals(t *testing.T) {
	s := newStore(t)
	_, err := s.Add("a", "", []string{All})
	require.NoError(t, err)
	es, _, err := read(s.path)
	require.NoError(t, err)
	d := document{Version: 1}
	for i := range MaxPrincipals {
		e := es[0]
		e.Name = fmt.Sprint("p", i)
		d.Principals = append(d.Principals, e)
	}
	write := func() {
		b, err := json.Marshal(d)
		require.NoError(t, err)
		require.NoError(t, replace(s.path, b))
	}
	write()
	_, err = s.Add("one-more", "", []string{All})
	assert.ErrorIs(t, err, ErrInvalid)
	d.Principals = append(d.Principals, es[0])
	write()
	_, err = s.List()
	assert.ErrorIs(t, err, ErrFile)
}

func TestUnusableFiles(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"group may read":   func(p string) error { return os.Chmod(p, 0o640) },
		"others may write": func(p string) error { return os.Chmod(p, 0o602) },
		"a link": func(p string) error {
			if err := os.Rename(p, p+".real"); err != nil {
				return err
			}
			return os.Symlink(p+".real", p)
		},
		"a directory": func(p string) error {
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.Mkdir(p, 0o700)
		},
		"truncated": func(p string) error { return os.Truncate(p, 40) },
		"empty":     func(p string) error { return os.Truncate(p, 0) },
		"endless":   func(p string) error { return os.Truncate(p, maxFile+1) },
		"of the future": func(p string) error {
			return os.WriteFile(p, []byte(`{"version":2,"principals":[]}`), 0o600)
		},
		"a bad name": func(p string) error {
			return os.WriteFile(p, []byte(`{"version":1,"principals":[{"name":"/"}]}`), 0o600)
		},
		"a bad hash": func(p string) error {
			return os.WriteFile(p, []byte(`{"version":1,"principals":[{"name":"a","hash":"x"}]}`), 0o600)
		},
		"a bad right": func(p string) error {
			h := newHash("s", Params{8, 1, 1}).String()
			return os.WriteFile(p, fmt.Appendf(nil, `{"version":1,"principals":[{"name":"a","hash":%q,"allow":["/"]}]}`, h), 0o600)
		},
		"twice": func(p string) error {
			h := newHash("s", Params{8, 1, 1}).String()
			return os.WriteFile(p, fmt.Appendf(nil, `{"version":1,"principals":[{"name":"a","hash":%q},{"name":"a","hash":%q}]}`, h, h), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			secret, err := s.Add("a", "", []string{All})
			require.NoError(t, err)
			_, err = s.Verify("a", secret)
			require.NoError(t, err)
			require.NoError(t, spoil(s.path))
			// Nothing is allowed on the word of a file that was good once.
			_, err = s.Verify("a", secret)
			assert.ErrorIs(t, err, ErrFile)
			_, err = s.List()
			assert.ErrorIs(t, err, ErrFile)
			_, err = s.Add("b", "", []string{All})
			assert.ErrorIs(t, err, ErrFile)
			assert.ErrorIs(t, s.Remove("a"), ErrFile)
		})
	}
}

func TestPathErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	s := open(filepath.Join(file, "auth.json"))
	_, err := s.Add("a", "", []string{All})
	assert.Error(t, err)
	_, err = s.List()
	assert.Error(t, err)
	_, err = s.Verify("a", "secret")
	assert.Error(t, err)
	assert.NotErrorIs(t, err, ErrDenied)
}

// A crash between any two steps of a change leaves the old file and no obstacle.
func TestLeftovers(t *testing.T) {
	s := newStore(t)
	secret, err := s.Add("a", "", []string{All})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.path+".new", []byte("half a fi"), 0o600))
	_, err = s.Verify("a", secret)
	require.NoError(t, err)
	_, err = s.Add("b", "", []string{All})
	require.NoError(t, err)
	ps, err := s.List()
	require.NoError(t, err)
	assert.Len(t, ps, 2)
	assert.NoFileExists(t, s.path+".new")

	require.NoError(t, os.MkdirAll(s.path+".new/x", 0o700))
	assert.Error(t, s.Remove("a"))
	_, err = s.Verify("a", secret)
	require.NoError(t, err)
}

// Writers that know nothing of one another lose nothing.
func TestConcurrentChanges(t *testing.T) {
	s := newStore(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			o := open(s.path)
			for j := range 5 {
				name := fmt.Sprintf("p%d-%d", i, j)
				secret, err := o.Add(name, "", []string{All})
				assert.NoError(t, err)
				_, err = s.Verify(name, secret)
				assert.NoError(t, err)
			}
		})
	}
	wg.Wait()
	ps, err := s.List()
	require.NoError(t, err)
	assert.Len(t, ps, 40)
}

func TestDefaultPath(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "/s")
	p, err := DefaultPath("web-1")
	require.NoError(t, err)
	assert.Equal(t, "/s/gondola/machines/web-1/auth.json", p)
	t.Setenv("XDG_STATE_HOME", "relative")
	t.Setenv("HOME", "/h")
	p, err = DefaultPath("m")
	require.NoError(t, err)
	assert.Equal(t, "/h/.local/state/gondola/machines/m/auth.json", p)
	t.Setenv("HOME", "")
	_, err = DefaultPath("m")
	assert.Error(t, err)
	for _, bad := range []string{"", "..", "a/b", ".hidden"} {
		_, err = DefaultPath(bad)
		assert.ErrorIs(t, err, ErrInvalid, bad)
	}
}

func TestMachines(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	names, err := Machines()
	require.NoError(t, err)
	assert.Empty(t, names)
	for _, name := range []string{"b", "a"} {
		path, err := DefaultPath(name)
		require.NoError(t, err)
		_, err = open(path).Add("p", "", []string{All})
		require.NoError(t, err)
	}
	dir, err := DefaultDir("no-principals")
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(dir, 0o700))
	names, err = Machines()
	require.NoError(t, err)
	assert.Equal(t, []string{"a", "b"}, names)
}

// Rights change and the secret stays; another process sees it.
func TestAllow(t *testing.T) {
	s := newStore(t)
	secret, err := s.Add("a", "", []string{"save"})
	require.NoError(t, err)
	running := open(s.path)
	p, err := running.Verify("a", secret)
	require.NoError(t, err)
	assert.False(t, p.May("list"))
	require.NoError(t, s.Allow("a", []string{"list", "list", "mark"}))
	p, err = running.Verify("a", secret)
	require.NoError(t, err)
	assert.Equal(t, []string{"list", "mark"}, p.Allow)
	assert.False(t, p.May("save"))
	assert.ErrorIs(t, s.Allow("b", []string{"list"}), ErrNotFound)
	for _, bad := range [][]string{nil, {""}, {"/"}, make([]string, MaxRights+1)} {
		assert.ErrorIs(t, s.Allow("a", bad), ErrInvalid, "%q", bad)
	}
	ps, err := s.List()
	require.NoError(t, err)
	assert.Equal(t, []Principal{p}, ps, "unchanged by what failed")
}

func TestHash(t *testing.T) {
	h := newHash("secret", Params{Memory: 16, Time: 2, Lanes: 2})
	got, err := parseHash(h.String())
	require.NoError(t, err)
	assert.Equal(t, h, got)
	assert.True(t, got.matches("secret"))
	assert.False(t, got.matches("Secret"))
	assert.NotEqual(t, h.String(), newHash("secret", h.Params).String(), "salted")

	// A vector of the reference implementation.
	ref, err := parseHash("$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHQ$ZVrRXqxlLcWfcXCnMyv0m4Rpvh/bnCi7")
	require.NoError(t, err)
	assert.True(t, ref.matches("password"))
	const ok = "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaasWeB"
	_, err = parseHash(ok)
	require.NoError(t, err)
	for _, r := range [][2]string{
		{"argon2id", "argon2i"}, {"v=19", "v=16"}, {"m=8", "m=7"}, {"m=8", "m=08"}, {"m=8", "m=99999999"}, {"m=8", "m=+8"},
		{"t=1", "t=0"}, {"t=1", "x=1"}, {"t=1", "t=65"}, {"p=1", "p=0"}, {"p=1", "p=257"}, {",p=1", ""},
		{"c29tZXNhbHQ", "c29t"}, {"c29tZXNhbHQ", "c29tZXNhbHR"}, {"c29tZXNhbHQ", "c29t\nZXNhbHQ"}, {"$c29tZXNhbHQ", ""},
		{"RdescudvJCsgt3ub+b4dWRWJTmaasWeB", "Rdes"}, {"RdescudvJCsgt3ub+b4dWRWJTmaasWeB", strings.Repeat("AAAA", 200)}, {"$argon", "argon"},
	} {
		bad := strings.Replace(ok, r[0], r[1], 1)
		_, err := parseHash(bad)
		assert.ErrorIs(t, err, errHash, bad)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"version":1,"principals":[{"name":"a","hash":"$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaasWeB","allow":["save","*"]}]}`))
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"principals":[{"name":"a"`))
	f.Fuzz(func(t *testing.T, b []byte) {
		es, err := parse(b)
		if err != nil {
			return
		}
		for _, e := range es {
			require.NoError(t, checkName("principal", e.Name))
			require.Equal(t, e.Hash, e.parsed.String())
			require.NoError(t, e.parsed.check())
		}
		again, err := json.Marshal(document{fileVersion, es})
		require.NoError(t, err)
		_, err = parse(again)
		require.NoError(t, err)
	})
}

func BenchmarkVerify(b *testing.B) {
	s := Open(filepath.Join(b.TempDir(), "auth.json"))
	secret, err := s.Add("a", "", []string{All})
	require.NoError(b, err)
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			clear(s.proven)
			_, err := s.Verify("a", secret)
			require.NoError(b, err)
		}
	})
	b.Run("remembered", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, err := s.Verify("a", secret)
			require.NoError(b, err)
		}
	})
	b.Run("unknown", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, err := s.Verify("b", secret)
			require.ErrorIs(b, err, ErrDenied)
		}
	})
}
