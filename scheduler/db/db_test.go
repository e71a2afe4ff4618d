package db

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// writer is set to a path in the process that TestKilled kills.
const writer = "GONDOLA_TEST_DB_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(writer); path != "" {
		writeForEver(path)
	}
	os.Exit(m.Run())
}

func open(t *testing.T, path string, o Options) *DB {
	t.Helper()
	d, err := Open(t.Context(), path, o)
	require.NoError(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func count(t *testing.T, d *DB, table string) (n int64) {
	t.Helper()
	require.NoError(t, d.Query(t.Context(), "SELECT count(*) FROM "+table, nil, func(_ []string, r []any) error { return scan(r, &n) }))
	return n
}

func decide(t *testing.T, d *DB, at time.Time, why string) {
	t.Helper()
	require.NoError(t, d.AddDecisions(t.Context(), Decision{Time: at, Machine: "web", Source: "test", Why: why}))
}

func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a?b#c%20", "g.db")
	d := open(t, path, Options{})
	decide(t, d, time.Now(), "first")
	st, err := os.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, fs.FileMode(0o600), st.Mode())
	var mode, n int64
	require.NoError(t, d.Query(t.Context(), "SELECT (SELECT journal_mode = 'wal' FROM pragma_journal_mode), foreign_keys FROM pragma_foreign_keys", nil,
		func(_ []string, r []any) error { return scan(r, &mode, &n) }))
	assert.Equal(t, []int64{1, 1}, []int64{mode, n})

	ro := open(t, path, Options{ReadOnly: true})
	assert.EqualValues(t, 1, count(t, ro, "decisions"))
	decide(t, d, time.Now(), "a reader sees what is written beside it")
	assert.EqualValues(t, 2, count(t, ro, "decisions"))
	for _, q := range []string{"DELETE FROM decisions", "DROP TABLE decisions", "CREATE TABLE x (y)"} {
		err := ro.Query(t.Context(), q, nil, func([]string, []any) error { return nil })
		assert.Error(t, err, q)
	}
	other := filepath.Join(t.TempDir(), "new.db")
	for _, q := range []string{"ATTACH '" + other + "' AS other; CREATE TABLE other.x (y)", "ATTACH 'file:" + other + "?mode=rwc' AS other; CREATE TABLE other.x (y)"} {
		assert.Error(t, ro.Query(t.Context(), q, nil, func([]string, []any) error { return nil }), q)
	}
	assert.NoFileExists(t, other)
	assert.EqualValues(t, 2, count(t, d, "decisions"))

	need := Need{Machine: "web", Resource: "cpu", Minimum: 0.5, Typical: 1, Peak: 2, Class: "processor", Updated: time.UnixMilli(5)}
	require.NoError(t, d.SetNeeds(t.Context(), need))
	need.Peak = 3
	require.NoError(t, d.SetNeeds(t.Context(), need))
	needs, err := d.Needs(t.Context())
	require.NoError(t, err)
	assert.Equal(t, []Need{need}, needs)

	copied := filepath.Join(t.TempDir(), "copy.db")
	require.NoError(t, ro.CopyTo(t.Context(), copied))
	assert.ErrorIs(t, ro.CopyTo(t.Context(), copied), fs.ErrExist)
	assert.EqualValues(t, 2, count(t, open(t, copied, Options{ReadOnly: true}), "decisions"))
}

func TestMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none", "g.db")
	_, err := Open(t.Context(), path, Options{ReadOnly: true})
	assert.ErrorIs(t, err, ErrMissing)
	assert.NoDirExists(t, filepath.Dir(path))
}

// What is no database, or one with holes, is moved aside, said, and a new one begun.
func TestDamaged(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, path string){
		"garbage": func(t *testing.T, path string) {
			require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("no database ", 999)), 0o600))
		},
		"truncated": func(t *testing.T, path string) { require.NoError(t, os.Truncate(path, 3*pageSize)) },
		"holes": func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			require.NoError(t, err)
			st, err := f.Stat()
			require.NoError(t, err)
			for at := int64(2 * pageSize); at < st.Size(); at += pageSize {
				_, err = f.WriteAt(make([]byte, 2000), at)
				require.NoError(t, err)
			}
			require.NoError(t, f.Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "g.db")
			d := open(t, path, Options{})
			for range 50 {
				decide(t, d, time.Now(), strings.Repeat("x", 500))
			}
			require.NoError(t, d.Close())
			damage(t, path)
			_, err := Open(t.Context(), path, Options{ReadOnly: true})
			if err == nil { // only some pages are damaged, which a reader may not meet
				assert.NotEqual(t, "garbage", name)
			} else {
				assert.ErrorIs(t, err, ErrDamaged)
			}
			var said []string
			d = open(t, path, Options{Say: func(s string) { said = append(said, s) }})
			require.Len(t, said, 1)
			assert.Contains(t, said[0], ".damaged-")
			aside, err := filepath.Glob(path + ".damaged-*")
			require.NoError(t, err)
			assert.NotEmpty(t, aside)
			assert.EqualValues(t, 0, count(t, d, "decisions"))
			decide(t, d, time.Now(), "goes on")
		})
	}
}

// Damage that shows up while the database is in use.
func TestDamagedInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "g.db")
	said := 0
	d := open(t, path, Options{Say: func(string) { said++ }})
	calls := 0
	require.NoError(t, d.Write(t.Context(), func(tx *sql.Tx) error {
		if calls++; calls == 1 {
			require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("no database ", 999)), 0o600))
			require.NoError(t, os.Truncate(path+"-wal", 0))
			return ErrDamaged
		}
		_, err := tx.Exec("INSERT INTO decisions (time_ms, machine, source, kind, before, after, why, numbers) VALUES (1, '', '', '', '', '', '', '')")
		return err
	}))
	assert.Equal(t, 2, calls)
	assert.Equal(t, 1, said)
	assert.EqualValues(t, 1, count(t, d, "decisions"))
}

func TestNewerAndForeign(t *testing.T) {
	path := filepath.Join(t.TempDir(), "g.db")
	d := open(t, path, Options{})
	decide(t, d, time.Now(), "kept")
	_, err := d.sql.Exec(fmt.Sprintf("PRAGMA user_version = %d", len(migrations)+1))
	require.NoError(t, err)
	require.NoError(t, d.Close())
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	for _, ro := range []bool{false, true} {
		_, err = Open(t.Context(), path, Options{ReadOnly: ro})
		require.ErrorIs(t, err, ErrNewer)
		assert.Contains(t, err.Error(), fmt.Sprintf("version %d", len(migrations)+1))
	}
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.True(t, bytes.Equal(before, after))

	path = filepath.Join(t.TempDir(), "other.db")
	other, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	_, err = other.Exec("CREATE TABLE mine (x)")
	require.NoError(t, err)
	require.NoError(t, other.Close())
	_, err = Open(t.Context(), path, Options{})
	assert.ErrorIs(t, err, ErrForeign)
}

func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "g.db")
	a := open(t, path, Options{})
	b := open(t, path, Options{Busy: 20 * time.Millisecond})
	require.NoError(t, a.Write(t.Context(), func(*sql.Tx) error {
		err := b.AddDecisions(t.Context(), Decision{})
		assert.ErrorIs(t, err, ErrLocked)
		return nil
	}))
	require.NoError(t, b.AddDecisions(t.Context(), Decision{}))

	unlock, err := lockFile(t.Context(), path+".lock", time.Second)
	require.NoError(t, err)
	_, err = Open(t.Context(), path, Options{Busy: 20 * time.Millisecond})
	assert.ErrorIs(t, err, ErrLocked)
	unlock()
	open(t, path, Options{})
}

// A full database forgets what is oldest; one that can forget nothing says that it
// is full, and works on.
func TestFull(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "g.db"), Options{MaxBytes: 1 << 20})
	for i := range 60 {
		decide(t, d, time.UnixMilli(int64(i)), strings.Repeat("x", 50<<10))
	}
	st, err := os.Stat(d.path)
	require.NoError(t, err)
	assert.LessOrEqual(t, st.Size(), int64(1<<20))
	var newest int64
	require.NoError(t, d.Query(t.Context(), "SELECT max(time_ms) FROM decisions", nil, func(_ []string, r []any) error { return scan(r, &newest) }))
	assert.EqualValues(t, 59, newest)
	n := count(t, d, "decisions")
	assert.Greater(t, n, int64(10))
	assert.Less(t, n, int64(21))

	err = d.AddDecisions(t.Context(), Decision{Why: strings.Repeat("x", 2<<20)})
	assert.ErrorIs(t, err, ErrFull)
	decide(t, d, time.UnixMilli(60), "still works")
}

// Rows are forgotten when they are old, and not because the clock jumps.
func TestPrune(t *testing.T) {
	now := time.Now()
	jump := time.Duration(0)
	path := filepath.Join(t.TempDir(), "g.db")
	d := open(t, path, Options{Retention: time.Hour, Now: func() time.Time {
		// As the system's clock when it is set: the wall clock jumps, the
		// monotonic one does not.
		if jump == 0 {
			return now
		}
		return now.Add(time.Minute)
	}})
	for i := range 2500 {
		_, err := d.sql.Exec("INSERT INTO decisions (id, time_ms, machine, source, kind, before, after, why, numbers) VALUES (?, ?, '', '', '', '', '', '', '')", i+1, now.Add(-2*time.Hour).UnixMilli())
		require.NoError(t, err)
	}
	decide(t, d, now, "young")
	require.NoError(t, d.SetNeeds(t.Context(), Need{Machine: "old", Resource: "cpu", Updated: now.Add(-2 * time.Hour)}, Need{Machine: "young", Resource: "cpu", Updated: now}))
	jump = 24 * time.Hour
	n, err := d.Prune(t.Context())
	require.NoError(t, err)
	assert.EqualValues(t, 2501, n)
	assert.EqualValues(t, 1, count(t, d, "decisions"))
	needs, err := d.Needs(t.Context())
	require.NoError(t, err)
	require.Len(t, needs, 1)
	assert.Equal(t, "young", needs[0].Machine)
}

// Decisions are numbered within a run of their source, and what becomes of them is
// added later, or never.
func TestDecisions(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "g.db"), Options{})
	at := time.UnixMilli(1e12)
	moved := Decision{Time: at, Machine: "a", Peer: "b", Source: "sched", Kind: "moved", Run: 9, Number: 1, Resource: "net", Amount: 5.5, Why: "because", Numbers: "{}"}
	judged := Decision{Time: at, Machine: "c", Source: "sched", Kind: "judged", Run: 9, Number: 2}
	require.NoError(t, d.AddDecisions(t.Context(), moved, judged, Decision{Time: at, Machine: "a", Source: "other"}))
	out := Outcome{Source: "sched", Run: 9, Number: 1, Outcome: "kept", Measured: `{"gain":4}`}
	require.NoError(t, d.Decide(t.Context(), nil, []Outcome{
		out, {Source: "sched", Run: 10, Number: 1, Outcome: "of another run"}, {Source: "other", Run: 9, Number: 1, Outcome: "of another source"}, {Source: "other", Outcome: "of none"},
	}))
	again := moved
	again.Why = "recorded twice"
	require.NoError(t, d.AddDecisions(t.Context(), again))
	moved.Outcome, moved.Measured = out.Outcome, out.Measured
	for _, name := range []string{"a", "b"} {
		list, err := d.Decisions(t.Context(), "sched", name, 0)
		require.NoError(t, err)
		assert.Equal(t, []Decision{moved}, list, name)
	}
	list, err := d.Decisions(t.Context(), "sched", "", 1)
	require.NoError(t, err)
	assert.Equal(t, []Decision{judged}, list, "the latest")
	list, err = d.Decisions(t.Context(), "sched", "", 0)
	require.NoError(t, err)
	assert.Equal(t, []Decision{moved, judged}, list)
	later := Decision{Time: at, Machine: "a", Source: "sched", Run: 11, Number: 1}
	require.NoError(t, d.AddDecisions(t.Context(), later))
	list, err = d.LastDecisions(t.Context(), "sched")
	require.NoError(t, err)
	assert.Equal(t, []Decision{later, judged}, list)
}

// An earlier gondola's database is brought up to date by who writes to it, with all
// that is in it; who only reads says what to do.
func TestMigration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "g.db")
	require.NoError(t, os.WriteFile(path, nil, 0o600)) // as it is for a moment when it is made
	_, err := Open(t.Context(), path, Options{ReadOnly: true})
	require.ErrorIs(t, err, ErrMissing)
	old, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	_, err = old.Exec(migrations[0] + fmt.Sprintf(`PRAGMA user_version = 1; PRAGMA application_id = %d;
		INSERT INTO decisions VALUES (1, 5, 'web', 'sched', 'k', '', '', 'old', '');
		INSERT INTO needs VALUES ('web', 'cpu', 1, 2, 3, 4);`, applicationID))
	require.NoError(t, err)
	require.NoError(t, old.Close())
	_, err = Open(t.Context(), path, Options{ReadOnly: true})
	require.ErrorIs(t, err, ErrOld)
	d := open(t, path, Options{})
	list, err := d.Decisions(t.Context(), "sched", "web", 0)
	require.NoError(t, err)
	assert.Equal(t, []Decision{{Time: time.UnixMilli(5), Machine: "web", Source: "sched", Kind: "k", Why: "old"}}, list)
	need := Need{Machine: "web", Resource: "cpu", Class: "idle", Updated: time.UnixMilli(5)}
	require.NoError(t, d.SetNeeds(t.Context(), need))
	needs, err := d.Needs(t.Context())
	require.NoError(t, err)
	assert.Equal(t, []Need{need}, needs)
}

// writeForEver tells of each transaction after its commit.
func writeForEver(path string) {
	d, err := Open(context.Background(), path, Options{})
	for i := 1; err == nil; i++ {
		err = d.Write(context.Background(), func(tx *sql.Tx) error {
			for range 2 { // both or none
				if _, err := tx.Exec("INSERT INTO decisions (time_ms, machine, source, kind, before, after, why, numbers) VALUES (?, '', '', '', '', '', '', '')", i); err != nil {
					return err
				}
			}
			return nil
		})
		fmt.Println(i)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// Whatever was committed survives kill -9, and nothing by halves.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "g.db")
	last := 0
	for round := range 4 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writer+"="+path)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		lines := bufio.NewScanner(out)
		last = 0
		for i := 0; i < 5+7*round && lines.Scan(); i++ {
			last, err = strconv.Atoi(lines.Text())
			require.NoError(t, err)
		}
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait() // killed
		d := open(t, path, Options{Say: func(s string) { t.Error(s) }})
		var top, odd int64
		require.NoError(t, d.Query(t.Context(), "SELECT max(time_ms), (SELECT count(*) FROM (SELECT count(*) AS n FROM decisions GROUP BY time_ms HAVING n % 2)) FROM decisions", nil,
			func(_ []string, r []any) error { return scan(r, &top, &odd) }))
		assert.GreaterOrEqual(t, top, int64(last))
		assert.Zero(t, odd)
		require.NoError(t, d.Close())
	}
	assert.Positive(t, last)
}

func TestClassify(t *testing.T) {
	assert.NoError(t, classify(nil))
	other := errors.New("other")
	assert.Equal(t, other, classify(other))
}
