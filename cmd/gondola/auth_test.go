package main

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// testAuth makes the machines' principals this test's, and returns those of web.
func testAuth(t *testing.T) *auth.Store {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	path, err := auth.DefaultPath("web")
	require.NoError(t, err)
	return auth.Open(path)
}

func TestAuth(t *testing.T) {
	store := testAuth(t)
	r := gondola(t, "auth", "add", "web", "backup", "--allow", "save,list")
	require.Zero(t, r.code, r.stderr)
	assert.Empty(t, r.stderr)
	secret := strings.TrimSuffix(r.stdout, "\n")
	p, err := store.Verify("backup", secret)
	require.NoError(t, err)
	assert.Equal(t, []string{"list", "save"}, p.Allow)
	path, err := auth.DefaultPath("web")
	require.NoError(t, err)
	fi, err := os.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, fs.FileMode(0o600), fi.Mode().Perm())

	// Given secrets are not shown.
	file := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(file, []byte("from a file\nand more\n"), 0o600))
	r = gondola(t, "auth", "add", "web", "deploy", "--allow", "*", "--secret-file", file)
	require.Zero(t, r.code, r.stderr)
	assert.Empty(t, r.stdout+r.stderr)
	_, err = store.Verify("deploy", "from a file")
	require.NoError(t, err)
	cmd, out, errOut := command("auth", "add", "web", "piped", "--allow=mark", "--allow", "host-info", "--secret-file=-")
	cmd.Stdin = strings.NewReader("from a pipe\r\n")
	require.NoError(t, cmd.Run(), errOut)
	assert.Empty(t, out.String())
	_, err = store.Verify("piped", "from a pipe")
	require.NoError(t, err)

	r = gondola(t, "auth", "set", "web", "backup", "--allow", "delete")
	require.Zero(t, r.code, r.stderr)
	assert.Empty(t, r.stdout)
	p, err = store.Verify("backup", secret)
	require.NoError(t, err)
	assert.Equal(t, []string{"delete"}, p.Allow)

	r = gondola(t, "auth", "ls", "web")
	require.Zero(t, r.code, r.stderr)
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	require.Len(t, lines, 4)
	assert.Regexp(t, `^PRINCIPAL +ALLOW +CREATED$`, lines[0])
	assert.Regexp(t, `^backup +delete +\d{4}-`, lines[1])
	assert.Regexp(t, `^deploy +\* `, lines[2])
	assert.Regexp(t, `^piped +host-info,mark `, lines[3])
	var list []map[string]any
	r = gondola(t, "auth", "ls", "--json", "web")
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &list))
	require.Len(t, list, 3)
	assert.Equal(t, "backup", list[0]["name"])
	created, err := time.Parse(time.RFC3339, list[0]["created"].(string))
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now(), created, time.Minute)
	assert.NotContains(t, r.stdout, "argon2", "nobody needs the hashes")
	assert.JSONEq(t, "[]", gondola(t, "auth", "ls", "--json", "other").stdout, "machines have nothing in common")

	r = gondola(t, "auth", "rm", "web", "backup", "nobody", "deploy")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "machine web: no such principal: nobody; gondola auth ls web")
	ps, err := store.List()
	require.NoError(t, err)
	require.Len(t, ps, 1, "the others are gone")
	assert.Equal(t, "piped", ps[0].Name)
}

func TestAuthRefuses(t *testing.T) {
	store := testAuth(t)
	_, err := store.Add("there", "", []string{"save"})
	require.NoError(t, err)
	short := filepath.Join(t.TempDir(), "short")
	require.NoError(t, os.WriteFile(short, []byte("1234567\n"), 0o600))
	for _, tc := range []struct {
		args string
		code int
		says string
	}{
		{"add web", exitUsage, "gondola auth add takes the name of a machine and of one principal"},
		{"add web a b --allow save", exitUsage, "of one principal"},
		{"add web a", exitUsage, "which operations? Give --allow"},
		{"add ../web a --allow save", exitUsage, "is not a name for a machine"},
		{"add web a/b --allow save", exitUsage, "principal \"a/b\""},
		{"add web a --allow sa/ve", exitUsage, "right \"sa/ve\""},
		{"add web there --allow save", exitFailed, "principal exists: there; remove it first, or give it other rights with gondola auth set"},
		{"add web a --allow save --secret-file " + short, exitUsage, "its first line has 7 bytes; a secret has 8 to 1024"},
		{"add web a --allow save --secret-file /no/such", exitFailed, "/no/such: no such file"},
		{"set web nobody --allow save", exitFailed, "no such principal: nobody"},
		{"set web there", exitUsage, "which operations?"},
		{"rm web", exitUsage, "and those of its principals"},
		{"ls", exitUsage, "takes the name of a machine"},
		{"ls web --yaml", exitUsage, "unknown flag"},
		{"frobnicate", exitUsage, "unknown command"},
	} {
		r := gondola(t, append([]string{"auth"}, strings.Fields(tc.args)...)...)
		assert.Equal(t, tc.code, r.code, "%s: %s", tc.args, r.stderr)
		assert.Contains(t, r.stderr, tc.says, tc.args)
		assert.Empty(t, r.stdout, tc.args)
	}
	ps, err := store.List()
	require.NoError(t, err)
	assert.Len(t, ps, 1)

	r := gondola(t, "auth", "set", "web", "there", "--allow", "sav")
	assert.Zero(t, r.code)
	assert.Contains(t, r.stderr, `note: there is no operation "sav"`)

	path, err := auth.DefaultPath("web")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(path, 0o644))
	r = gondola(t, "auth", "ls", "web")
	assert.Equal(t, exitFailed, r.code)
	assert.Contains(t, r.stderr, "chmod 600 "+path)
}

func TestAuthCompletion(t *testing.T) {
	home := testHome(t)
	store := testAuth(t)
	for _, name := range []string{"ada", "bob"} {
		_, err := store.Add(name, "", []string{"save"})
		require.NoError(t, err)
	}
	runMachine(t, home, "running", control.Info{})
	for args, want := range map[string]string{
		"add ":                        "running\nweb\n",
		"rm web ":                     "ada\nbob\n",
		"rm web ada ":                 "bob\n",
		"set web ":                    "ada\nbob\n",
		"add web ":                    ":4\n",
		"set web ada --allow sa":      "save\n",
		"set web ada --allow list,sa": "list,save\n",
	} {
		words := append([]string{"__complete", "auth"}, strings.Fields(args)...)
		if strings.HasSuffix(args, " ") {
			words = append(words, "")
		}
		r := gondola(t, words...)
		assert.Contains(t, r.stdout, want, args)
	}
}
