package fleet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func testOptions() Options {
	return Options{
		File: "shop.yaml", HostMemory: 4 << 30, Policies: []string{"linux", "activity"},
		CheckName: func(s string) error {
			if !namePattern.MatchString(s) {
				return fmt.Errorf("%q is no name", s)
			}
			return nil
		},
		Check: func(key, value string) error {
			if value == "nonsense" {
				return errors.New("nonsense for " + key)
			}
			return nil
		},
	}
}

const whole = `
name: shop
isolation: library
policy: activity
defaults: {memory: 64M, restart: on-failure}
machines:
  db:
    kernel: vmlinux
    initrd: none
    cmdline: quiet
    userland: busybox
    image: root.img
    memory: 256M
    memory-min: 64M
    memory-max: 128M
    vcpus: 2
    shares: 500
    time-critical: true
    command: [httpd, -f, ""]
    env: {A: b, N: 3, T: true}
    workdir: /srv
    user: nobody
    copy: ["./prog:/prog"]
    disks: ["data.img,serial=d", /abs.img]
    disk-slots: 1
    net: user,host
    ports: ["8080:80"]
    balloon: false
    rng: true
    verbose: true
    restart: {policy: always, back-off: 100ms, back-off-max: 10s, reset: 5s, max: 3}
    stop-timeout: 3s
  job: {command: echo hello, after: db, count: 2}
  last: {after: [job], restart: never}
  plain:
`

func TestParse(t *testing.T) {
	o := testOptions()
	o.Dir = "/fleet"
	f, err := Parse([]byte(whole), o)
	require.NoError(t, err)
	assert.Equal(t, "shop", f.Name)
	assert.Equal(t, Library, f.Isolation)
	assert.Equal(t, "activity", f.Policy)
	require.Len(t, f.Machines, 5)
	assert.Equal(t, Machine{
		Name: "db", Kernel: "/fleet/vmlinux", Initrd: "none", Cmdline: "quiet", Userland: "busybox", Image: "/fleet/root.img",
		Memory: 256 << 20, MemoryMin: 64 << 20, MemoryMax: 128 << 20, VCPUs: 2, Shares: 500, TimeCritical: true,
		Command: []string{"httpd", "-f", ""}, Env: map[string]string{"A": "b", "N": "3", "T": "true"}, WorkDir: "/srv", User: "nobody",
		Copy: []string{"/fleet/prog:/prog"}, Disks: []string{"/fleet/data.img,serial=d", "/abs.img"}, DiskSlots: 1,
		Net: "user,host", Ports: []string{"8080:80"}, NoBalloon: true, RNG: true, Verbose: true,
		Restart:     Restart{RestartAlways, 100 * time.Millisecond, 10 * time.Second, 5 * time.Second, 3},
		StopTimeout: 3 * time.Second, Line: 7, Column: 3,
	}, f.Machines[0])
	assert.Equal(t, []string{"job-1", "job-2", "last", "plain"}, []string{f.Machines[1].Name, f.Machines[2].Name, f.Machines[3].Name, f.Machines[4].Name})
	assert.Equal(t, []string{"sh", "-c", "echo hello"}, f.Machines[1].Command)
	assert.Equal(t, []string{"db"}, f.Machines[2].After)
	assert.Equal(t, []string{"job-1", "job-2"}, f.Machines[3].After)
	assert.Equal(t, RestartOnFailure, f.Machines[4].Restart.Policy)
	assert.Equal(t, RestartNever, f.Machines[3].Restart.Policy)
	assert.EqualValues(t, 64<<20, f.Machines[4].Memory)
	assert.Equal(t, [][]string{{"db", "plain"}, {"job-1", "job-2"}, {"last"}}, f.Waves())
}

// Without a name, the fleet has the file's; anchors and merges work.
func TestParseAliases(t *testing.T) {
	f, err := Parse([]byte("machines:\n  a: &a {memory: 64M, ports: ['0:80']}\n  b:\n    <<: *a\n    vcpus: 2\n  c: *a\n"), testOptions())
	require.NoError(t, err)
	assert.Equal(t, "shop", f.Name)
	assert.EqualValues(t, 64<<20, f.Machines[1].Memory)
	assert.Equal(t, 2, f.Machines[1].VCPUs)
	assert.EqualValues(t, 64<<20, f.Machines[2].Memory)
}

// Each file with what is said of it; a problem's place is LINE:COLUMN.
var wrong = []struct {
	name, text string
	says       []string
	shape      bool // the schema has to refuse it, too
}{
	{"empty", "", []string{"1:1: the file is empty"}, true},
	{"comment", "# nothing\n", []string{"the file is empty"}, true},
	{"no mapping", "- a\n", []string{"1:1: want keys with values, not a list"}, true},
	{"no machines", "name: a\n", []string{"1:1: machines: missing"}, true},
	{"machines empty", "machines: {}\n", []string{"1:11: machines: empty"}, true},
	{"machines null", "machines:\n", []string{"machines: want keys with values, not nothing"}, true},
	{"not yaml", "machines:\n  a: [\n  b: {\n", []string{"not YAML"}, true},
	{"tab", "machines:\n\ta: {}\n", []string{":2:1: not YAML"}, true},
	{"unknown key", "machines:\n  a:\n    memroy: 64M\n", []string{"shop.yaml:3:5: machines.a.memroy: unknown key: is memory meant?"}, true},
	{"underscore", "machines:\n  a:\n    memory_min: 64M\n", []string{"is memory-min meant?"}, true},
	{"unknown top key", "nonsense-key: 1\nmachines: {a: }\n", []string{"1:1: nonsense-key: unknown key: the keys here are defaults, isolation,"}, true},
	{"wrong in defaults, once", "defaults: {vcpus: 0}\nmachines: {a: , b: }\n", []string{"1:19: defaults.vcpus: want a whole number from 1 to 16, not 0"}, true},
	{"vcpus", "machines:\n  a: {vcpus: 17}\n  b: {vcpus: 1.5}\n  c: {vcpus: two}\n", []string{"2:14: machines.a.vcpus: want a whole number from 1 to 16, not 17", "3:14", "4:14"}, true},
	{"shares", "machines:\n  a: {shares: 0}\n  b: {shares: 1000000000}\n", []string{"machines.a.shares: want a whole number from 1 to 1048576, not 0", "not 1000000000"}, true},
	{"memory", "machines:\n  a: {memory: lots}\n  b: {memory: -1}\n  c: {memory: 1.5G}\n  d: {memory: []}\n", []string{`want a size, like 256M or 1G, not "lots"`, "b.memory: want 1 or more", "c.memory", "d.memory"}, true},
	{"text", "machines:\n  a: {kernel: 5, cmdline: ''}\n", []string{`want text, not 5: write "5"`, "want some text"}, true},
	{"booleans", "machines:\n  a: {rng: maybe, time-critical: 1}\n", []string{`want true or false, not "maybe"`, "not 1"}, true},
	{"command", "machines:\n  a: {command: []}\n  b: {command: [1]}\n  c: {command: {}}\n", []string{"a.command: the list is empty", "b.command[0]: want text", "c.command: want a list"}, true},
	{"env", "machines:\n  a: {env: {X: }}\n  b: {env: {'A=B': c}}\n  c: {env: [A=b]}\n", []string{"a.env.X: want text, not nothing", "not the name of a variable", "c.env: want keys"}, true},
	{"restart", "machines:\n  a: {restart: sometimes}\n  b: {restart: {policy: always, back-off: soon, max: -1, maxx: 1}}\n", []string{"want never, on-failure, always", "want a time, like 500ms", "b.restart.max: want", "is max meant?"}, true},
	{"isolation", "isolation: jail\nmachines: {a: }\n", []string{"want process, library"}, true},
	{"userland", "machines: {a: {userland: gnu}}\n", []string{"want busybox, busybox-links, uroot, none"}, true},
	{"count", "machines: {a: {count: 0}, b: {count: 5000}}\n", []string{"a.count", "b.count"}, true},
	{"machine's name", "machines:\n  -a: {}\n  'a b': {}\n", []string{`"-a" is no name`, `"a b" is no name`}, true},
	{"fleet's name", "name: ../x\nmachines: {a: }\n", []string{"name: \"../x\" is no name"}, true},
	{"list of machines", "machines: [a]\n", []string{"machines: want keys with values, not a list"}, true},

	{"duplicate", "machines:\n  a: {}\n  b: {}\n  a: {}\n", []string{"4:3: machines.a: given twice, first in line 2"}, false},
	{"duplicate key", "machines:\n  a:\n    vcpus: 1\n    vcpus: 2\n", []string{"4:5: machines.a.vcpus: given twice, first in line 3"}, false},
	{"duplicate through count", "machines:\n  a: {count: 2}\n  a-2: {}\n", []string{"3:3: machines.a-2: makes a second machine a-2, beside that of line 2"}, false},
	{"cycle", "machines:\n  a: {after: b}\n  b: {after: [c]}\n  c: {after: [a]}\n", []string{"a circle, nobody can start first: a after b after c after a"}, false},
	{"after itself", "machines:\n  a: {after: a}\n", []string{"2:14: machines.a.after: a circle, nobody can start first: a after a"}, false},
	{"after nobody", "machines:\n  data: {}\n  b: {after: [dta, x]}\n", []string{`"dta" is no machine of this fleet: is data meant?`, `"x" is no machine of this fleet`}, false},
	{"impossible minimums", "machines:\n  a: {memory: 4G, count: 2}\n  b: {memory: 2G, memory-min: 1G}\n", []string{"their minimums are 5.0 GiB together, and the host has 4.0 GiB", "most of it in a, line 2"}, false},
	{"minimum above maximum", "machines:\n  a: {memory: 64M, memory-min: 65M}\n  b: {memory: 64M, memory-max: 32M, memory-min: 33M}\n", []string{"2:32: machines.a.memory-min: 65M is more than the 64M", "33M is more than the 32M"}, false},
	{"maximum above memory", "machines:\n  a: {memory: 64M, memory-max: 1G}\n", []string{"1G is more than its memory, 64M"}, false},
	{"memory overflow", "machines: {a: {memory: 99999999999T}, b: {memory: 0M}}\n", []string{"want a number of bytes", "0: leave the key out"}, false},
	{"ports twice", "machines:\n  a: {ports: ['8080:80']}\n  b: {ports: ['127.0.0.1:8080:81']}\n  c: {ports: ['1:1'], count: 2}\n  d: {ports: ['2:2'], net: 'tap:t'}\n  e: {ports: ['3:3'], net: none}\n",
		[]string{"3:14: machines.b.ports: port 127.0.0.1:8080 is a's already (line 2)", "2 machines cannot publish", "ports are for net: user", "there is no network"}, false},
	{"tap twice", "machines: {a: {net: 'tap:t0'}, b: {net: 'tap:t0,mtu=1400'}}\n", []string{"tap interface t0 is a's already"}, false},
	{"too many disks", "machines: {a: {disks: [a, b], disk-slots: 16}}\n", []string{"18 disks with image and disk-slots"}, false},
	{"embedder's checks", "machines: {a: {net: nonsense, disks: [nonsense], copy: [nonsense], image: nonsense}}\n", []string{"nonsense for net", "a.disks[0]: nonsense for disks", "nonsense for copy", "nonsense for image"}, false},
	{"policy", "policy: magic\nmachines: {a: }\n", []string{`"magic": want linux, activity`}, false},
	{"times", "machines: {a: {stop-timeout: 2h, restart: {back-off: 1h, back-off-max: 1s}}}\n", []string{"2h: want 10ms to 1h", "back-off 1h0m0s is more than back-off-max 1s"}, false},
	{"aliases without end", "machines: &m {a: {<<: *m}}\n", []string{"unknown key"}, true},
}

func TestParseRefuses(t *testing.T) {
	schema := compileSchema(t)
	for _, tc := range wrong {
		t.Run(tc.name, func(t *testing.T) {
			f, err := Parse([]byte(tc.text), testOptions())
			var problems Problems
			require.ErrorAs(t, err, &problems)
			assert.Nil(t, f)
			for _, s := range tc.says {
				assert.Contains(t, err.Error(), s)
			}
			assert.Equal(t, tc.shape, slices.ContainsFunc(problems, func(p Problem) bool { return p.Shape }), err)
			if v, ok := generic([]byte(tc.text)); ok {
				if tc.shape {
					assert.Error(t, schema.Validate(v), "the schema takes it")
				} else {
					assert.NoError(t, schema.Validate(v), "the schema does not take what only sums and names make wrong")
				}
			}
		})
	}
}

// All problems come at once, in the file's order, each once.
func TestAllProblemsAtOnce(t *testing.T) {
	_, err := Parse([]byte("name: -x\nmachines:\n  a: {vcpus: 99, after: nobody}\n  b: {memroy: 1G, net: nonsense}\n"), testOptions())
	var p Problems
	require.ErrorAs(t, err, &p)
	require.Len(t, p, 5, err)
	assert.True(t, slices.IsSortedFunc(p, func(a, b Problem) int { return a.Line - b.Line }))
	b, err := json.Marshal(p[0])
	require.NoError(t, err)
	assert.Contains(t, string(b), `"line":1,"column":7,"path":"name"`)
}

func TestBigFiles(t *testing.T) {
	var s strings.Builder
	s.WriteString("machines:\n")
	for i := range 200 {
		fmt.Fprintf(&s, "  m%d: {memory: 1M, wrong: 1}\n", i)
	}
	_, err := Parse([]byte(s.String()), testOptions())
	assert.ErrorContains(t, err, "and 100 more problems")
	_, err = Parse([]byte("machines: {a: }\n---\nmachines: {b: }\n"), testOptions())
	assert.ErrorContains(t, err, "a second document begins here")
	_, err = Parse(bytes.Repeat([]byte("#"), MaxFile+1), testOptions())
	assert.ErrorContains(t, err, "the file has more than")
	_, err = Parse([]byte("machines: {a: {count: 4000}, b: {count: 4000}}"), testOptions())
	assert.ErrorContains(t, err, "more than 4096 machines")
	// A small file that unfolds to a large one.
	s.Reset()
	s.WriteString("x: &x [" + strings.Repeat("a,", 2000) + "]\nmachines:\n")
	for i := range 300 {
		fmt.Fprintf(&s, "  m%d: {copy: *x}\n", i)
	}
	_, err = Parse([]byte(s.String()), testOptions())
	assert.ErrorContains(t, err, "too many aliases")
}

func compileSchema(t testing.TB) *jsonschema.Schema {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema))
	require.NoError(t, err)
	c := jsonschema.NewCompiler()
	require.NoError(t, c.AddResource("fleet.json", v))
	s, err := c.Compile("fleet.json")
	require.NoError(t, err)
	return s
}

// generic is a YAML text as JSON knows it.
func generic(text []byte) (any, bool) {
	var v any
	if yaml.Unmarshal(text, &v) != nil {
		return nil, false
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, false
	}
	j, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	return j, err == nil
}

// The keys that the parser knows are those of the schema, at every level, and each
// has a description for the editor.
func TestSchemaHasTheParsersKeys(t *testing.T) {
	type object struct {
		Properties map[string]struct{ Description string }
	}
	var s struct {
		object
		Defs struct{ Machine, Restart object } `json:"$defs"`
	}
	require.NoError(t, json.Unmarshal(Schema, &s))
	var keys []string
	p := &parser{}
	for k := range p.machineKeys(&Machine{}, new(int)) {
		keys = append(keys, k)
	}
	var known []string
	for k, v := range s.Defs.Machine.Properties {
		known = append(known, k)
		assert.NotEmpty(t, v.Description, k)
	}
	assert.ElementsMatch(t, known, keys)
	// The other levels tell their keys in the error for an unknown one.
	for _, tc := range []struct {
		text  string
		level object
	}{
		{"qqqqqqqqqqqq: 1\nmachines: {a: }", s.object},
		{"machines: {a: {restart: {qqqqqqqqqqqq: 1}}}", s.Defs.Restart},
	} {
		_, err := Parse([]byte(tc.text), testOptions())
		require.Error(t, err)
		_, list, _ := strings.Cut(err.Error(), "the keys here are ")
		var known []string
		for k := range tc.level.Properties {
			known = append(known, k)
		}
		assert.ElementsMatch(t, known, strings.Split(list, ", "))
	}
}

// The schema takes what the parser takes, and the parser refuses what it refuses.
func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	for _, tc := range wrong {
		f.Add([]byte(tc.text))
	}
	schema := compileSchema(f)
	f.Fuzz(func(t *testing.T, text []byte) {
		fl, err := Parse(text, testOptions())
		shape := false
		if err != nil {
			var p Problems
			require.ErrorAs(t, err, &p)
			require.NotEmpty(t, p)
			for _, e := range p {
				require.Positive(t, e.Line)
				require.Positive(t, e.Column)
				shape = shape || e.Shape
			}
		} else {
			require.NotEmpty(t, fl.Machines)
			require.Equal(t, len(fl.Machines), count(fl.Waves()))
		}
		v, ok := generic(text)
		if !ok || bytes.ContainsAny(text, "&*<") { // aliases are the decoder's to unfold
			return
		}
		if verr := schema.Validate(v); verr != nil && err == nil {
			t.Fatalf("parsed, but the schema says: %v", verr)
		}
	})
}

func count(waves [][]string) (n int) {
	for _, w := range waves {
		n += len(w)
	}
	return n
}
