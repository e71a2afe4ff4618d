//go:build !lean

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/gondola-vmm/gondola/balloon/policy/host"
	"github.com/gondola-vmm/gondola/scheduler/fleet"
	"github.com/gondola-vmm/gondola/scheduler/gate"
	"github.com/gondola-vmm/gondola/vmm/control"
)

func fleetCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "fleet",
		Short: "Run several machines from one file, supervised",
		Long: `A fleet is several machines described in one YAML file: what they boot and run,
their memory, processors, disks and networks, what they need of each other, and
when they are restarted (docs/fleet.md). gondola fleet schema prints the file's
JSON Schema, with which editors complete and check it.

The machines are ordinary ones: gondola exec, logs, info, top and the others work
with them. With isolation: process (the default) they outlive their supervisor, and
the next gondola fleet up or down finds them again.`,
		Example: `  gondola fleet check shop.yaml
  gondola fleet up -d shop.yaml
  gondola fleet ps
  gondola fleet reload shop.yaml
  gondola fleet down shop`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(fleetUpCommand(), fleetDownCommand(), fleetPsCommand(), fleetReloadCommand(), fleetCheckCommand(), fleetSchemaCommand())
	return c
}

// completeFile completes the first argument with fleet files.
func completeFile(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return []string{"yaml", "yml", "json"}, cobra.ShellCompDirectiveFilterFileExt
}

// completeFleet completes the first argument with the fleets that are up.
func completeFleet(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, err := fleetNames()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return names, cobra.ShellCompDirectiveDefault // or a file
}

// readFleet reads and checks a fleet file.
func readFleet(file string) (text []byte, f *fleet.Fleet, abs string, err error) {
	fi, err := os.Stat(file)
	if err == nil && fi.Size() > fleet.MaxFile {
		return nil, nil, "", fmt.Errorf("%s has %d bytes: a fleet file has at most %d", file, fi.Size(), fleet.MaxFile)
	}
	if text, err = os.ReadFile(file); err != nil {
		return nil, nil, "", err
	}
	if abs, err = filepath.Abs(file); err != nil {
		return nil, nil, "", err
	}
	f, err = parseFleet(text, file, abs)
	return text, f, abs, err
}

// parseFleet checks a fleet file's text with all that this host knows.
func parseFleet(text []byte, file, abs string) (*fleet.Fleet, error) {
	o := fleet.Options{File: file, Dir: filepath.Dir(abs), CheckName: control.CheckName, Check: checkValue, Policies: gate.Policies()}
	if h, err := host.Read(); err == nil { // else no sum is impossible
		o.HostMemory = h.Total
	}
	f, err := fleet.Parse(text, o)
	if err != nil {
		return nil, err
	}
	var problems fleet.Problems
	if f.Policy != "" && f.Policy != gate.Linux && f.Isolation != fleet.Library {
		problems = append(problems, fleet.Problem{File: file, Line: 1, Column: 1, Path: "policy",
			Text: f.Policy + " is for isolation: library, where one gate serves all vCPUs; with processes, gondola sched run schedules them"})
	}
	// What only the flags' own checks know, once a description.
	said := map[int]bool{}
	for i := range f.Machines {
		m := &f.Machines[i]
		if _, _, err := parseRun(runArgs(f.Name, m)); err != nil && !said[m.Line] {
			said[m.Line] = true
			problems = append(problems, fleet.Problem{File: file, Line: m.Line, Column: m.Column, Path: "machines." + m.Name, Text: err.Error()})
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return f, nil
}

// problemsError prints what is wrong with a file, a line each, as compilers do.
func problemsError(err error) error {
	var p fleet.Problems
	if !errors.As(err, &p) {
		return err
	}
	fmt.Fprintln(os.Stderr, p)
	what := fmt.Sprintf("%d problems", len(p))
	if len(p) == 1 {
		what = "1 problem"
	}
	return usageError{fmt.Errorf("%s in %s; gondola fleet schema prints what can be in it", what, p[0].File)}
}

func fleetCheckCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:               "check FILE",
		Short:             "Check a fleet file: all that is wrong with it, by line",
		Args:              oneFile,
		ValidArgsFunction: completeFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			_, f, _, err := readFleet(args[0])
			var p fleet.Problems
			if asJSON && (err == nil || errors.As(err, &p)) {
				if err := printJSON(cmd.OutOrStdout(), struct {
					Fleet    *fleet.Fleet   `json:"fleet,omitempty"`
					Problems fleet.Problems `json:"problems"`
				}{f, append(fleet.Problems{}, p...)}); err != nil || p == nil {
					return err
				}
				return exitCode(exitUsage)
			}
			if err != nil {
				return problemsError(err)
			}
			minimum, vcpus := uint64(0), 0
			for i := range f.Machines {
				minimum += f.Machines[i].Min()
				vcpus += max(f.Machines[i].VCPUs, 1)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: fleet %s, %d machines with %d vCPUs and at least %s of memory, nothing wrong\n",
				args[0], f.Name, len(f.Machines), vcpus, size(minimum))
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable, with the machines as they would be")
	return c
}

func fleetSchemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of fleet files, for editors",
		Long: `Print the JSON Schema of fleet files. With the YAML language server, an editor
uses it for files that begin with

  # yaml-language-server: $schema=PATH

PATH being where this command's output was written to.`,
		Example: "  gondola fleet schema > ~/.config/gondola-fleet.schema.json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(fleet.Schema)
			return err
		},
	}
}

// fleetUpFlags are the flags of gondola fleet up.
type fleetUpFlags struct {
	detach, quiet, asJSON bool
	metrics               string
}

func fleetUpCommand() *cobra.Command {
	f := fleetUpFlags{}
	c := &cobra.Command{
		Use:   "up FILE",
		Short: "Start the machines of a file and supervise them",
		Long: `Start the machines of FILE, those that others need (after:) first, and supervise
them until they are told to stop: Ctrl-C, SIGTERM or gondola fleet down. A second
Ctrl-C does not wait for guests any more. Without -d it also ends when all machines
have ended and none is to be restarted; the exit code is then 1 if one had failed.

If the fleet is up already, it becomes what FILE says now, and machines that have
ended or failed are started again. If its supervisor was killed, this one finds the
machines that still run and takes them over.`,
		Example: `  gondola fleet up shop.yaml
  gondola fleet up -d --metrics 127.0.0.1:9184 shop.yaml`,
		Args:              oneFile,
		ValidArgsFunction: completeFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd.Context(), args[0], cmd.OutOrStdout())
		},
	}
	fl := c.Flags()
	fl.BoolVarP(&f.detach, "detach", "d", false, "supervise in the background; return when all machines are ready or have ended")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "say nothing but errors")
	fl.BoolVar(&f.asJSON, "json", false, "print every event as a line of JSON")
	fl.StringVar(&f.metrics, "metrics", "", "serve Prometheus metrics at this address, for example 127.0.0.1:9184")
	return c
}

func (f *fleetUpFlags) run(ctx context.Context, file string, w io.Writer) error {
	text, fl, abs, err := readFleet(file)
	if err != nil {
		return problemsError(err)
	}
	bg := inherited()
	dir, err := claimFleet(fl.Name)
	if errors.Is(err, errSupervised) {
		return f.update(ctx, &fleetDir{path: fleetPath(fl.Name)}, abs, text, w)
	}
	if err != nil {
		return err
	}
	if f.detach && bg == nil {
		// The child claims it.
		if err := dir.lock.Close(); err != nil {
			return err
		}
		name, err := detach(ctx, selfExe, dir.path, "the supervisor", os.Args[1:], f.quiet)
		if err != nil {
			return err
		}
		fmt.Println(name)
		return dir.failures(ctx)
	}
	s := &supervision{dir: dir, flags: f, out: w, file: abs, stopping: make(chan struct{}), bg: bg}
	if bg != nil {
		if err := os.Rename(bg.file, dir.file("log")); err != nil {
			return err
		}
		s.out = &boundedFile{f: os.Stdout}
	}
	return s.run(ctx, fl, text)
}

// failures tells which machines failed at their start; they may be in back-off.
func (d *fleetDir) failures(ctx context.Context) error {
	// The guests that have just begun may leave its supervisor little of the host.
	const patience = 6
	s, err := d.status(ctx)
	for n := 1; n < patience && errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil; n++ {
		s, err = d.status(ctx)
	}
	if err != nil {
		return err
	}
	for _, m := range s.Machines {
		if m.State == fleet.Failed || m.Blocked {
			why := m.Note
			if m.Last != nil {
				why = m.Last.String()
			}
			fmt.Fprintf(os.Stderr, "gondola: machine %s: %s\n", m.Name, printable(why))
			err = exitCode(1)
		}
	}
	return err
}

func fleetPath(name string) string {
	return filepath.Join(control.DefaultHome(), fleetsDir, name)
}

// update makes a supervised fleet what the file says and waits until it is ready.
func (f *fleetUpFlags) update(ctx context.Context, d *fleetDir, file string, text []byte, w io.Writer) error {
	if f.metrics != "" {
		return usageError{fmt.Errorf("--metrics is for the start of a supervisor, and fleet %s has one, process %d: gondola fleet down first", d.name(), d.supervisor())}
	}
	changes, err := d.reload(ctx, file, text, true)
	if err != nil {
		return problemsError(err)
	}
	if !f.quiet {
		if err := printChanges(w, changes, f.asJSON); err != nil {
			return err
		}
	}
	for {
		s, err := d.status(ctx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(s.Machines, func(m fleet.Status) bool { return m.State == fleet.Starting || m.State == fleet.Waiting && !m.Blocked }) {
			return d.failures(ctx)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

func printChanges(w io.Writer, changes []fleet.Change, asJSON bool) error {
	if asJSON {
		return printJSON(w, append([]fleet.Change{}, changes...))
	}
	n := 0
	for _, c := range changes {
		if c.Action != fleet.Keep {
			n++
			if _, err := fmt.Fprintln(w, c); err != nil {
				return err
			}
		}
	}
	_, err := fmt.Fprintf(w, "%d of %d machines changed\n", n, len(changes))
	return err
}

// reload asks the supervisor to make the fleet what the text says.
func (d *fleetDir) reload(ctx context.Context, file string, text []byte, revive bool) ([]fleet.Change, error) {
	var r reloadReply
	if err := d.call(ctx, http.MethodPost, "/reload", reloadRequest{file, string(text), revive}, &r); err != nil {
		return nil, err
	}
	if len(r.Problems) > 0 {
		return nil, r.Problems
	}
	if r.Error != "" {
		return r.Changes, fmt.Errorf("fleet %s: %s", d.name(), r.Error)
	}
	return r.Changes, nil
}

// supervision is a process that supervises a fleet.
type supervision struct {
	dir   *fleetDir
	flags *fleetUpFlags
	out   io.Writer
	file  string // absolute
	bg    *background
	sup   *fleet.Supervisor

	insisted context.Context // its end makes stops insist
	insist   context.CancelFunc
	stopOnce sync.Once
	stopping chan struct{} // closed when it is to end

	mu      sync.Mutex
	state   fleetState
	metrics string // where they are served
}

// run supervises until it is told to stop.
func (s *supervision) run(ctx context.Context, f *fleet.Fleet, text []byte) (err error) {
	before := map[string]int{}
	if old, err := s.dir.read(); err == nil {
		before = old.Machines
	}
	s.state = fleetState{Name: f.Name, File: s.file, Text: string(text), Started: time.Now(), Machines: map[string]int{}}
	for name, pid := range before { // until it is known what has become of them
		s.state.Machines[name] = pid
	}
	if err := s.dir.write(s.state); err != nil {
		return err
	}
	var runner fleet.Runner = &processRunner{dir: s.dir, before: before}
	if f.Isolation == fleet.Library {
		g, err := newFleetGate(f.Policy)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, g.Close()) }()
		runner = &libraryRunner{dir: s.dir, gate: g}
	}
	s.sup = fleet.NewSupervisor(runner, s.event)
	insist, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.insisted, s.insist = insist, cancel

	closeServers, err := s.serve()
	if err != nil {
		return errors.Join(err, s.dir.remove())
	}
	defer closeServers()
	sigs := make(chan os.Signal, 4)
	signal.Notify(sigs, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(sigs)
	go func() {
		for range sigs {
			select {
			case <-s.stopping:
				cancel() // the second one
			default:
				s.stop(false)
			}
		}
	}()
	// Machines of a fleet that was left, and are not in the file any more.
	if err := s.sweep(insist, f); err != nil {
		s.say(err.Error())
	}
	if _, err := s.sup.Reload(insist, f, true); err != nil {
		return errors.Join(err, s.dir.remove())
	}
	ended, cancelWait := context.WithCancel(ctx)
	defer cancelWait()
	go func() {
		select {
		case <-s.stopping:
			cancelWait()
		case <-ended.Done():
		}
	}()
	if s.bg != nil {
		if s.sup.WaitReady(ended) == nil {
			s.bg.ready(f.Name)
		}
		<-ended.Done()
	} else {
		_ = s.sup.Wait(ended) // its end is the signal to stop
	}
	failed := ""
	for _, m := range s.sup.Status() {
		if m.State == fleet.Failed {
			failed = m.Name
		}
	}
	s.stop(false)
	s.sup.Stop(insist)
	for _, m := range s.sup.Status() {
		if m.PID != 0 && m.Last != nil && m.Last.Err != "" {
			err = errors.Join(err, fmt.Errorf("machine %s: %s", m.Name, m.Last.Err))
		}
	}
	closeServers()
	err = errors.Join(err, s.dir.remove())
	if err == nil && failed != "" && s.bg == nil {
		return exitCode(1)
	}
	return err
}

// sweep ends machines of this fleet that an earlier supervisor left and the file
// does not have any more.
func (s *supervision) sweep(ctx context.Context, f *fleet.Fleet) error {
	left, err := fleetMachines(ctx, f.Name)
	if err != nil {
		return err
	}
	var names []string
	for name := range left {
		if f.Machine(name) == nil {
			names = append(names, name)
		}
	}
	return eachMachine(names, func(name string) error {
		s.say(name + ": stopping, not in the file any more")
		return endMachine(ctx, name, fleet.DefaultStopTimeout)
	})
}

// endMachine ends a machine whatever it takes.
func endMachine(ctx context.Context, name string, timeout time.Duration) error {
	_, err := stop(ctx, name, control.StopRequest{TimeoutMS: max(timeout.Milliseconds(), 1)})
	if err == nil || errors.Is(err, control.ErrNotRunning) {
		return nil
	}
	return killProcess(name)
}

// stop begins the end; with hard, guests are not waited for.
func (s *supervision) stop(hard bool) {
	s.stopOnce.Do(func() { close(s.stopping) })
	if hard {
		s.insist()
	}
}

// event notes and prints a change of a machine's state.
func (s *supervision) event(e fleet.Event) {
	s.mu.Lock()
	before := s.state.Machines[e.Status.Name]
	if e.Status.PID != 0 {
		s.state.Machines[e.Status.Name] = e.Status.PID
	} else if e.Status.State != fleet.Starting && e.Status.State != fleet.Waiting {
		delete(s.state.Machines, e.Status.Name)
	}
	var err error
	if s.state.Machines[e.Status.Name] != before {
		err = s.dir.write(s.state)
	}
	s.mu.Unlock()
	if err != nil {
		s.say(fmt.Sprintf("the state is not saved: %v", err))
	}
	if s.flags.quiet {
		return
	}
	if s.flags.asJSON {
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = printJSONLine(s.out, e) // nobody may be left who reads it
		return
	}
	s.say(e.Status.Name + ": " + e.Text)
}

func (s *supervision) say(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text = printable(text)
	fmt.Fprintf(s.out, "%s %s\n", time.Now().Format("15:04:05"), text)
	if s.bg != nil {
		_, _ = fmt.Fprintln(s.bg.report, sayProgress+text) // nobody may be left who reads it
	}
}

func (s *supervision) status() fleetStatus {
	s.mu.Lock()
	st := fleetStatus{Name: s.state.Name, File: s.state.File, PID: os.Getpid(), Started: s.state.Started, Metrics: s.metrics}
	s.mu.Unlock()
	if f := s.sup.Fleet(); f != nil {
		st.Isolation, st.Policy = f.Isolation, f.Policy
	}
	st.Machines = s.sup.Status()
	return st
}

// serve answers on the fleet's socket and, with --metrics, on TCP.
func (s *supervision) serve() (stop func(), err error) {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, code int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(v) // nobody may be left who reads it
	}
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, s.status()) })
	mux.HandleFunc("POST /reload", func(w http.ResponseWriter, r *http.Request) {
		var req reloadRequest
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 8*fleet.MaxFile)).Decode(&req); err != nil {
			answer(w, http.StatusBadRequest, reloadReply{Error: err.Error()})
			return
		}
		changes, err := s.reload(req)
		reply := reloadReply{Changes: changes}
		if err != nil && !errors.As(err, &reply.Problems) {
			reply.Error = err.Error()
		}
		answer(w, http.StatusOK, reply)
	})
	mux.HandleFunc("POST /stop", func(w http.ResponseWriter, r *http.Request) {
		s.stop(r.URL.Query().Get("kill") == "1")
		answer(w, http.StatusOK, struct{}{})
	})
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	m := newMetrics(home, s.dir.name(), func() []fleetStatus { return []fleetStatus{s.status()} })
	mux.Handle("GET /metrics", m.handler())
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	stop = sync.OnceFunc(func() {
		cancel()
		serving.Wait()
		m.clients.Close()
		home.Close()
	})
	defer func() {
		if err != nil {
			stop()
		}
	}()
	l, err := s.dir.listen()
	if err != nil {
		return nil, fmt.Errorf("fleet's socket: %w", err)
	}
	serving.Go(func() {
		if err := serveHTTP(ctx, l, mux); err != nil {
			s.say(fmt.Sprintf("the fleet's socket: %v", err))
		}
	})
	if s.flags.metrics != "" {
		tcp, err := listenMetrics(s.flags.metrics)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.metrics = tcp.Addr().String()
		s.mu.Unlock()
		s.say("metrics at http://" + tcp.Addr().String() + "/metrics")
		serving.Go(func() {
			if err := serveHTTP(ctx, tcp, m.mux()); err != nil {
				s.say(fmt.Sprintf("metrics: %v", err))
			}
		})
	}
	return stop, nil
}

// reload makes the fleet what a text says.
func (s *supervision) reload(req reloadRequest) ([]fleet.Change, error) {
	f, err := parseFleet([]byte(req.Text), req.File, req.File)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	name := s.state.Name
	s.mu.Unlock()
	if f.Name != name {
		return nil, fmt.Errorf("the file is of fleet %s, not %s", f.Name, name)
	}
	if now := s.sup.Fleet(); now != nil && (now.Isolation != f.Isolation || now.Policy != f.Policy) {
		return nil, errors.New("isolation and policy are settled when a fleet goes up: gondola fleet down, then up")
	}
	s.mu.Lock()
	s.state.File, s.state.Text = req.File, req.Text
	err = s.dir.write(s.state)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return s.sup.Reload(s.insisted, f, req.Revive)
}

func fleetReloadCommand() *cobra.Command {
	var dry, asJSON bool
	c := &cobra.Command{
		Use:   "reload FILE",
		Short: "Make a fleet that is up what its file says now",
		Long: `Apply the difference between the fleet that is up and FILE: new machines are
started, those that are gone from the file stopped, those whose description changed
replaced; shares, memory-min, memory-max, restart, after and stop-timeout change
without that. Machines that did not change are not touched.`,
		Args:              oneFile,
		ValidArgsFunction: completeFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			text, f, abs, err := readFleet(args[0])
			if err != nil {
				return problemsError(err)
			}
			d, err := findFleet(f.Name)
			if err != nil {
				return err
			}
			if d.supervisor() == 0 {
				return fmt.Errorf("fleet %s has no supervisor, it was killed: gondola fleet up %s takes over", f.Name, args[0])
			}
			var changes []fleet.Change
			if dry {
				st, err := d.read()
				if err != nil {
					return err
				}
				now, err := fleet.Parse([]byte(st.Text), fleet.Options{File: st.File, Dir: filepath.Dir(st.File)})
				if err != nil {
					return err
				}
				changes = fleet.Diff(now, f)
			} else if changes, err = d.reload(cmd.Context(), abs, text, false); err != nil {
				return problemsError(err)
			}
			return printChanges(cmd.OutOrStdout(), changes, asJSON)
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "change nothing: print the difference")
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

func fleetDownCommand() *cobra.Command {
	var kill bool
	c := &cobra.Command{
		Use:   "down FILE|NAME",
		Short: "Stop the machines of a fleet and its supervisor",
		Long: `Stop the machines of a fleet, those that others need last, and end its supervisor.
If the supervisor was killed, the machines that still run are found and stopped all
the same. With --kill, guests are not asked.`,
		Example: `  gondola fleet down shop
  gondola fleet down ./shop.yaml --kill`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{errors.New("gondola fleet down takes one fleet, by its file or its name; gondola fleet ps shows those that are up")}
			}
			return nil
		},
		ValidArgsFunction: completeFleet,
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := findFleet(fleetName(args[0]))
			if err != nil {
				return err
			}
			return d.down(cmd.Context(), kill, cmd.OutOrStdout())
		},
	}
	c.Flags().BoolVar(&kill, "kill", false, "stop the machines without asking their guests")
	return c
}

// fleetName is the name that an argument means: a fleet's, or that of the fleet in
// a file.
func fleetName(arg string) string {
	ext := filepath.Ext(arg)
	isFile := slices.Contains([]string{".yaml", ".yml", ".json"}, ext) || strings.ContainsRune(arg, filepath.Separator)
	if !isFile {
		return arg
	}
	name := strings.TrimSuffix(filepath.Base(arg), ext)
	if text, err := os.ReadFile(arg); err == nil && len(text) <= fleet.MaxFile {
		// The rest of the file may be wrong by now.
		var v struct{ Name string }
		if yaml.Unmarshal(text, &v) == nil && v.Name != "" {
			name = v.Name
		}
	}
	return name
}

// down ends a fleet, with or without its supervisor.
func (d *fleetDir) down(ctx context.Context, kill bool, w io.Writer) error {
	if d.supervisor() != 0 {
		q := ""
		if kill {
			q = "?kill=1"
		}
		if err := d.call(ctx, http.MethodPost, "/stop"+q, nil, &struct{}{}); err != nil {
			if d.supervisor() != 0 {
				return err
			}
		}
		said := map[string]fleet.State{}
		for d.supervisor() != 0 {
			if s, err := d.status(ctx); err == nil {
				for _, m := range s.Machines {
					if said[m.Name] != m.State && m.State == fleet.Stopped {
						fmt.Fprintf(w, "%s\n", m.Name)
					}
					said[m.Name] = m.State
				}
			}
			if err := pause(ctx, 50*time.Millisecond); err != nil {
				return err
			}
		}
		if _, err := os.Stat(d.file("state.json")); err != nil {
			return nil // it ended as it should
		}
	}
	// Nobody supervises them: this process does, for as long as it takes.
	claimed, err := claimFleet(d.name())
	if err != nil {
		return err
	}
	st, err := claimed.read()
	if err != nil {
		return errors.Join(err, claimed.lock.Close())
	}
	left, err := fleetMachines(ctx, d.name())
	if err != nil {
		return errors.Join(err, claimed.lock.Close())
	}
	// Those that do not answer, but are known.
	running, err := machines(ctx, false, "")
	if err != nil {
		return errors.Join(err, claimed.lock.Close())
	}
	for _, m := range running {
		if st.Machines[m.Name] == m.PID {
			if _, ok := left[m.Name]; !ok {
				left[m.Name] = m
			}
		}
	}
	waves, timeouts := [][]string{nil}, map[string]time.Duration{}
	if f, err := fleet.Parse([]byte(st.Text), fleet.Options{File: st.File}); err == nil {
		waves = f.Waves()
		for i := range f.Machines {
			timeouts[f.Machines[i].Name] = f.Machines[i].StopTimeout
		}
	}
	for name := range left {
		if !slices.ContainsFunc(waves, func(w []string) bool { return slices.Contains(w, name) }) {
			waves[0] = append(waves[0], name)
		}
	}
	for i := len(waves) - 1; i >= 0; i-- {
		var names []string
		for _, n := range waves[i] {
			if _, ok := left[n]; ok {
				names = append(names, n)
			}
		}
		if err := eachMachine(names, func(name string) error {
			t := timeouts[name]
			if t == 0 {
				t = fleet.DefaultStopTimeout
			}
			if kill {
				t = time.Millisecond
			}
			if err := endMachine(ctx, name, t); err != nil {
				return err
			}
			_, err := fmt.Fprintln(w, name)
			return err
		}); err != nil {
			return errors.Join(err, claimed.lock.Close())
		}
	}
	return claimed.remove()
}

func fleetPsCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "ps [FILE|NAME]",
		Short: "List the fleets that are up and their machines",
		Long: `List the fleets that are up, or one of them, with their machines. The states:
waiting (for machines of after:), starting, running, back-off (it ended and will be
started again), ended, failed (it will not), stopping, stopped.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError{errors.New("gondola fleet ps takes one fleet at most")}
			}
			return nil
		},
		ValidArgsFunction: completeFleet,
		RunE: func(cmd *cobra.Command, args []string) error {
			names, err := fleetNames()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				name := fleetName(args[0])
				if _, err := findFleet(name); err != nil {
					return err
				}
				names = []string{name}
			}
			list := []fleetStatus{}
			for _, name := range names {
				d := &fleetDir{path: fleetPath(name)}
				s, err := d.status(cmd.Context())
				if err != nil {
					if len(args) == 0 { // it may have gone in between, and others are there
						fmt.Fprintf(os.Stderr, "gondola: %v\n", err)
						continue
					}
					return err
				}
				list = append(list, s)
			}
			return printFleets(cmd.OutOrStdout(), list, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable")
	return c
}

func printFleets(w io.Writer, list []fleetStatus, asJSON bool) error {
	if asJSON {
		return printJSON(w, list)
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "FLEET\tMACHINE\tSTATE\tPID\tFOR\tRESTARTS\tLAST END\tNOTE")
	for _, f := range list {
		for _, m := range f.Machines {
			pid, since, last, note := "-", "-", "-", m.Note
			if m.PID != 0 {
				pid = fmt.Sprint(m.PID)
			}
			if !m.Since.IsZero() {
				since = shortDuration(time.Since(m.Since))
			}
			if m.Last != nil {
				last = shorten(printable(m.Last.String()), 60)
			}
			if m.NextStart != nil {
				note = "restart in " + shortDuration(time.Until(*m.NextStart))
			}
			if f.PID == 0 {
				note = "nobody supervises it: gondola fleet up " + f.File
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", f.Name, m.Name, m.State, pid, since, m.Restarts, last, orDash(printable(note)))
		}
	}
	return tw.Flush()
}
