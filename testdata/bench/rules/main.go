// Command rules is the workload with which gondola's rules are measured: a web
// server for a guest, and a load for the host (run.sh).
//
//	rules serve ADDR                      answer each request after some work
//	rules load URL N SECONDS FILE LABEL   N clients in a row of requests each; appends what it saw to FILE
//	rules sum FILE                        a table of all that is in FILE, by label
package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// work is what a request costs: hashing so many bytes.
var work = make([]byte, 64<<10)

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		err = http.ListenAndServe(os.Args[2], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, "%x\n", sha256.Sum256(work)) // a client that is gone does not matter
		}))
	case len(os.Args) == 7 && os.Args[1] == "load":
		err = load(os.Args[2], os.Args[3], os.Args[4], os.Args[5], os.Args[6])
	case len(os.Args) == 3 && os.Args[1] == "sum":
		err = sum(os.Args[2])
	default:
		err = fmt.Errorf("usage: rules serve ADDR | load URL N SECONDS FILE LABEL | sum FILE")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "rules:", err)
		os.Exit(1)
	}
}

// phase is what a load saw.
type phase struct {
	Label   string          `json:"label"`
	Seconds float64         `json:"seconds"`
	Failed  int             `json:"failed"`
	Took    []time.Duration `json:"took_ns"`
}

func load(url, clients, seconds, file, label string) error {
	n, err := strconv.Atoi(clients)
	if err != nil {
		return err
	}
	s, err := strconv.Atoi(seconds)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	p := phase{Label: label}
	c := &http.Client{Timeout: time.Duration(s) * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: n}}
	begin := time.Now()
	end := begin.Add(time.Duration(s) * time.Second)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for time.Now().Before(end) {
				at := time.Now()
				r, err := c.Get(url)
				if err == nil {
					_, err = io.Copy(io.Discard, r.Body)
					r.Body.Close()
				}
				mu.Lock()
				if err != nil {
					p.Failed++
				} else {
					p.Took = append(p.Took, time.Since(at))
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	p.Seconds = time.Since(begin).Seconds()
	if len(p.Took) == 0 {
		return fmt.Errorf("no request of %d was answered", p.Failed)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(json.NewEncoder(f).Encode(p), f.Close())
}

// sum adds up the phases of each label. The first label is what others are compared with,
// over all rounds together and in the median of the rounds.
func sum(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	var labels []string
	all := map[string][]phase{}
	dec := json.NewDecoder(f)
	for {
		var p phase
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		if all[p.Label] == nil {
			labels = append(labels, p.Label)
		}
		all[p.Label] = append(all[p.Label], p)
	}
	fmt.Println("| | requests/s | of the first | in the median of rounds | p50 ms | p99 ms | requests | failed |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
	first := 0.0
	for _, label := range labels {
		var took []time.Duration
		var ratios []float64
		seconds, failed := 0.0, 0
		for i, p := range all[label] {
			took, seconds, failed = append(took, p.Took...), seconds+p.Seconds, failed+p.Failed
			if base := all[labels[0]]; i < len(base) {
				ratios = append(ratios, float64(len(p.Took))/p.Seconds/(float64(len(base[i].Took))/base[i].Seconds))
			}
		}
		slices.Sort(took)
		slices.Sort(ratios)
		at := func(p float64) float64 { return float64(took[int(p*float64(len(took)-1))].Microseconds()) / 1000 }
		rate := float64(len(took)) / seconds
		if first == 0 {
			first = rate
		}
		fmt.Printf("| %s | %.1f | %.0f %% | %.0f %% | %.1f | %.1f | %d | %d |\n", label, rate, 100*rate/first, 100*ratios[len(ratios)/2], at(0.5), at(0.99), len(took), failed)
	}
	return nil
}
