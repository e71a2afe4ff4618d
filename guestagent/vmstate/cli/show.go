//go:build linux

package cli

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/guestagent/vmstate"
	"github.com/gondola-vmm/gondola/snapshot/ports"
)

// print prints a JSON line.
func (c *command) print(v any) error {
	_, err := c.stdout.Write(append(appendJSON(nil, v), '\n'))
	return err
}

// clean makes one printable line of words from elsewhere.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// size is a number of bytes for people.
func size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	f, u := float64(n)/1024, 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[u])
}

func hostJSON(h ports.HostInfo) object {
	return object{
		{"disk_free", h.DiskFree}, {"disk_total", h.DiskTotal}, {"mem_free", h.MemFree}, {"mem_total", h.MemTotal},
		{"load", []any{h.Load[0], h.Load[1], h.Load[2]}}, {"cpus", h.CPUs},
	}
}

func (c *command) showHost(e vmstate.Event) error {
	var h ports.HostInfo
	if err := e.Decode(&h); err != nil {
		return err
	}
	if c.json {
		return c.print(hostJSON(h))
	}
	_, err := fmt.Fprintf(c.stdout, "disk: %s free of %s\nmemory: %s free of %s\nload: %.2f %.2f %.2f on %d processors\n",
		size(h.DiskFree), size(h.DiskTotal), size(h.MemFree), size(h.MemTotal), h.Load[0], h.Load[1], h.Load[2], h.CPUs)
	return err
}

func resourceJSON(r ports.Resource) object {
	o := object{
		{"configured", r.Configured}, {"minimum", r.Minimum}, {"maximum", r.Maximum}, {"target", r.Target}, {"actual", r.Actual}, {"reached", r.Reached},
	}
	if r.Problem != "" {
		o = append(o, member{"problem", r.Problem})
	}
	return o
}

func (c *command) showResource(e vmstate.Event) error {
	var r ports.Resource
	if err := e.Decode(&r); err != nil {
		return err
	}
	if c.json {
		return c.print(resourceJSON(r))
	}
	text := size
	if e.Op == ports.OpCPUs {
		text = func(n uint64) string { return strconv.FormatUint(n, 10) }
	}
	state := ""
	switch {
	case r.Problem != "":
		state = ", " + clean(r.Problem)
	case !r.Reached:
		state = ", on its way"
	}
	_, err := fmt.Fprintf(c.stdout, "%s of %s, target %s, %s to %s may be asked for%s\n", text(r.Actual), text(r.Configured), text(r.Target), text(r.Minimum), text(r.Maximum), state)
	return err
}

func when(ms int64) string {
	if ms == 0 {
		return "-"
	}
	return time.UnixMilli(ms).UTC().Format(time.RFC3339)
}

func stateJSON(s ports.State) object {
	tags := s.Tags
	if tags == nil {
		tags = []string{}
	}
	return object{
		{"name", s.Name}, {"parent", s.Parent}, {"description", s.Description}, {"tags", tags}, {"time", when(s.UnixMilli)}, {"bytes", s.Bytes},
	}
}

func listJSON(l ports.ListResult) object {
	states := make([]any, len(l.States))
	for i, s := range l.States {
		states[i] = stateJSON(s)
	}
	return object{{"states", states}, {"current", l.Current}}
}

// showList prints a line for each state: name, parent, time, bytes, tags and
// description, between tabs; a - stands for what is not there.
func (c *command) showList(e vmstate.Event) error {
	var l ports.ListResult
	if err := e.Decode(&l); err != nil {
		return err
	}
	if c.json {
		return c.print(listJSON(l))
	}
	var b strings.Builder
	for _, s := range l.States {
		f := []string{s.Name, s.Parent, when(s.UnixMilli), strconv.FormatUint(s.Bytes, 10), strings.Join(s.Tags, ","), s.Description}
		for i := range f {
			if f[i] = clean(f[i]); f[i] == "" {
				f[i] = "-"
			}
		}
		b.WriteString(strings.Join(f, "\t") + "\n")
	}
	_, err := c.stdout.Write([]byte(b.String()))
	return err
}

// showTree prints states below their parents. A parent that is not there, or a
// circle, makes a root.
func (c *command) showTree(e vmstate.Event) error {
	var l ports.ListResult
	if err := e.Decode(&l); err != nil {
		return err
	}
	if c.json {
		return c.print(listJSON(l))
	}
	_, err := c.stdout.Write([]byte(tree(l)))
	return err
}

func tree(l ports.ListResult) string {
	there, children := map[string]bool{}, map[string][]ports.State{}
	for _, s := range l.States {
		there[s.Name] = true
	}
	var roots []ports.State
	for _, s := range l.States {
		if there[s.Parent] && s.Parent != s.Name {
			children[s.Parent] = append(children[s.Parent], s)
		} else {
			roots = append(roots, s)
		}
	}
	var b strings.Builder
	seen := map[string]bool{}
	var show func(s ports.State, first, rest string)
	show = func(s ports.State, first, rest string) {
		if seen[s.Name] {
			return
		}
		seen[s.Name] = true
		line := first + clean(s.Name)
		if s.Name == l.Current {
			line += " *"
		}
		if s.Description != "" {
			line += "  " + clean(s.Description)
		}
		b.WriteString(line + "\n")
		for i, k := range children[s.Name] {
			if i == len(children[s.Name])-1 {
				show(k, rest+"└─ ", rest+"   ")
			} else {
				show(k, rest+"├─ ", rest+"│  ")
			}
		}
	}
	for _, s := range roots {
		show(s, "", "")
	}
	for _, s := range l.States { // circles
		show(s, "", "")
	}
	return b.String()
}

func (c *command) showState(e vmstate.Event) error {
	var s ports.State
	if err := e.Decode(&s); err != nil {
		return err
	}
	if c.json {
		return c.print(stateJSON(s))
	}
	_, err := fmt.Fprintf(c.stdout, "name: %s\nparent: %s\ndescription: %s\ntags: %s\ntime: %s\nbytes: %d\n",
		clean(s.Name), clean(s.Parent), clean(s.Description), clean(strings.Join(s.Tags, ",")), when(s.UnixMilli), s.Bytes)
	return err
}

// outcome prints what became of a request: one word, and what belongs to it.
func (c *command) outcome(e vmstate.Event) error {
	if c.json {
		return c.print(eventJSON(e))
	}
	words := map[string]string{ports.OpSave: "saved", ports.OpRestore: "restored", ports.OpDelete: "deleted"}
	line := words[e.Op]
	if line == "" {
		line = "done"
	}
	if len(e.Result) > 0 && e.Op != ports.OpSave {
		line += " " + cborJSON(e.Result)
	}
	_, err := fmt.Fprintln(c.stdout, line)
	return err
}

// eventJSON has what an event has; data that is no UTF-8 is in data_base64.
func eventJSON(e vmstate.Event) object {
	o := object{{"kind", e.Kind.String()}, {"op", e.Op}, {"id", e.ID}, {"seq", e.Seq}}
	if e.Restored() {
		o = append(o, member{"restored", true})
	}
	if e.Code != 0 {
		o = append(o, member{"code", uint32(e.Code)})
	}
	if e.Message != "" {
		o = append(o, member{"message", e.Message})
	}
	if e.Listener != "" {
		o = append(o, member{"listener", e.Listener})
	}
	if e.Data != nil {
		if utf8.Valid(e.Data) {
			o = append(o, member{"data", string(e.Data)})
		} else {
			o = append(o, member{"data_base64", base64.StdEncoding.EncodeToString(e.Data)})
		}
	}
	if e.Lost > 0 {
		o = append(o, member{"lost", e.Lost})
	}
	if v := resultJSON(e); v != nil {
		o = append(o, member{"result", v})
	}
	return o
}

// resultJSON names what is known of the results.
func resultJSON(e vmstate.Event) any {
	if len(e.Result) == 0 {
		return nil
	}
	switch e.Op {
	case ports.OpHostInfo:
		var h ports.HostInfo
		if e.Decode(&h) == nil {
			return hostJSON(h)
		}
	case ports.OpList:
		var l ports.ListResult
		if e.Decode(&l) == nil {
			return listJSON(l)
		}
	case ports.OpMemory, ports.OpCPUs:
		var r ports.Resource
		if e.Decode(&r) == nil {
			return resourceJSON(r)
		}
	case ports.OpMark:
		var m ports.MarkResult
		if e.Decode(&m) == nil {
			return object{{"granted_ms", m.Millis}}
		}
	case ports.OpSave, ports.OpDescribe:
		var s ports.State
		if e.Decode(&s) == nil {
			return stateJSON(s)
		}
	}
	var v any
	if proto.Unmarshal(e.Result, &v) != nil {
		return nil
	}
	return v
}

// line is an event on one line: number, kind, operation, then name=value.
func line(e vmstate.Event) string {
	op := e.Op
	if op == "" {
		op = "-"
	}
	s := fmt.Sprintf("%d %s %s id=%d", e.Seq, e.Kind, clean(op), e.ID)
	if e.Code != 0 {
		s += fmt.Sprintf(" code=%d", e.Code)
	}
	if e.Lost != 0 {
		s += fmt.Sprintf(" lost=%d", e.Lost)
	}
	if e.Listener != "" {
		s += fmt.Sprintf(" listener=%q", e.Listener)
	}
	if e.Data != nil {
		s += fmt.Sprintf(" data=%q", e.Data)
	}
	if e.Message != "" {
		s += fmt.Sprintf(" message=%q", e.Message)
	}
	if len(e.Result) > 0 {
		s += " result=" + cborJSON(e.Result)
	}
	return s
}

// events calls f for each event until --count of them have come, or ctx ends.
func (c *command) events(ctx context.Context, name string, f func(vmstate.Event) error) error {
	l, err := vmstate.Listen(ctx, c.socket, name)
	if err != nil {
		return err
	}
	defer l.Close()
	for n := 0; c.count <= 0 || n < c.count; n++ {
		select {
		case e := <-l.Events():
			if err := f(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil // the caller's end; a signal ends the process
		}
	}
	return nil
}

func (c *command) watch(ctx context.Context) error {
	return c.events(ctx, c.listen, func(e vmstate.Event) error {
		if c.json {
			return c.print(eventJSON(e))
		}
		_, err := fmt.Fprintln(c.stdout, line(e))
		return err
	})
}

// listenRun runs the command for each event, one after the other. Its last exit code
// is vmstate's.
func (c *command) listenRun(ctx context.Context) error {
	code := 0
	err := c.events(ctx, c.args[0], func(e vmstate.Event) (err error) {
		code, err = c.start(e)
		return err
	})
	if err == nil && code != 0 {
		return exitStatus(code)
	}
	return err
}

// start runs the command with the event in its environment and the data on its
// standard input.
func (c *command) start(e vmstate.Event) (code int, err error) {
	env := append(os.Environ(),
		"VMSTATE_EVENT="+e.Kind.String(), "VMSTATE_OP="+e.Op, fmt.Sprintf("VMSTATE_ID=%d", e.ID), fmt.Sprintf("VMSTATE_SEQ=%d", e.Seq),
		"VMSTATE_LISTENER="+e.Listener, fmt.Sprintf("VMSTATE_CODE=%d", e.Code), "VMSTATE_MESSAGE="+e.Message,
		fmt.Sprintf("VMSTATE_LOST=%d", e.Lost), fmt.Sprintf("VMSTATE_RESTORED=%v", e.Restored()),
	)
	result := ""
	if len(e.Result) > 0 {
		result = string(appendJSON(nil, resultJSON(e)))
	}
	env = append(env, "VMSTATE_RESULT="+result)
	for i, v := range env {
		env[i] = strings.ReplaceAll(v, "\x00", "") // the kernel's strings end there
	}
	argv := c.rest
	path := lookPath(argv[0])
	if path == "" {
		// A shell may have commands of its own (busybox).
		path, argv = "/bin/sh", append([]string{"sh", "-c", `exec "$@"`, "sh"}, argv...)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	// A pipe takes 64 KiB, which is more than an event has.
	_, err = w.Write(e.Data)
	if err = errors.Join(err, w.Close()); err != nil {
		return 0, err
	}
	out, ok := c.stdout.(*os.File)
	errs, ok2 := c.stderr.(*os.File)
	if !ok || !ok2 {
		return 0, errors.New("listen needs files for its output")
	}
	p, err := os.StartProcess(path, argv, &os.ProcAttr{Env: env, Files: []*os.File{r, out, errs}})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", c.rest[0], err)
	}
	st, err := p.Wait()
	if err != nil {
		return 0, err
	}
	if code = st.ExitCode(); code < 0 {
		code = 128 // a signal; which one does not fit into less
	}
	return code, nil
}

// lookPath finds a program as execvp(3) does; "" if it is not there.
func lookPath(name string) string {
	executable := func(path string) bool {
		fi, err := os.Stat(path)
		return err == nil && !fi.IsDir() && fi.Mode()&0o111 != 0
	}
	if strings.Contains(name, "/") {
		return name // the start says what is wrong with it
	}
	for dir := range strings.SplitSeq(os.Getenv("PATH"), ":") {
		if dir == "" {
			dir = "."
		}
		if path := dir + "/" + name; executable(path) {
			return path
		}
	}
	return ""
}

// status prints how the helper is.
func (c *command) status(ctx context.Context) error {
	client := vmstate.New(c.socket, vmstate.Credentials{})
	defer client.Close()
	s, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if c.json {
		listeners, latest := make([]any, len(s.Listeners)), make([]any, len(s.Latest))
		for i, l := range s.Listeners {
			listeners[i] = object{{"name", l.Name}, {"uid", l.UID}, {"pid", int64(l.PID)}, {"queued", l.Queued}, {"lost", l.Lost}}
		}
		for i, r := range s.Latest {
			latest[i] = object{{"id", r.ID}, {"op", r.Op}, {"uid", r.UID}, {"pid", int64(r.PID)}, {"time", when(r.UnixMilli)}}
		}
		return c.print(object{
			{"software", s.Software}, {"carrier", s.Carrier}, {"trouble", s.Trouble}, {"requests", s.Requests}, {"events", s.Events},
			{"lost", s.Lost}, {"no_taker", s.NoTaker}, {"skipped", s.Skipped}, {"clients", s.Clients},
			{"listeners", listeners}, {"latest", latest},
		})
	}
	var b strings.Builder
	carrier := s.Carrier
	if carrier == "" {
		carrier = "none: " + s.Trouble
	}
	fmt.Fprintf(&b, "%s\ncarrier: %s\nrequests: %d\nevents: %d, %d lost by slow listeners, %d with data for nobody\nclients: %d\n",
		clean(s.Software), clean(carrier), s.Requests, s.Events, s.Lost, s.NoTaker, s.Clients)
	for _, l := range s.Listeners {
		fmt.Fprintf(&b, "listener: %q uid=%d pid=%d queued=%d lost=%d\n", l.Name, l.UID, l.PID, l.Queued, l.Lost)
	}
	for _, r := range s.Latest {
		fmt.Fprintf(&b, "request: %d %s uid=%d pid=%d %s\n", r.ID, clean(r.Op), r.UID, r.PID, when(r.UnixMilli))
	}
	_, err = c.stdout.Write([]byte(b.String()))
	return err
}
