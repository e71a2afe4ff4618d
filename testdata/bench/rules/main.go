// Command rules is the workload with which gondola's rules are measured: a web
// server and a batch job for a guest, and a load for the host (run.sh).
//
//	rules serve ADDR          answer each request after some work
//	rules hog                 compute for ever
//	rules load URL N SECONDS  N clients in a row of requests each; prints the figures
package main

import (
	"crypto/sha256"
	"encoding/json"
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
	case len(os.Args) == 2 && os.Args[1] == "hog":
		for {
			sha256.Sum256(work)
		}
	case len(os.Args) == 5 && os.Args[1] == "load":
		err = load(os.Args[2], os.Args[3], os.Args[4])
	default:
		err = fmt.Errorf("usage: rules serve ADDR | hog | load URL N SECONDS")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "rules:", err)
		os.Exit(1)
	}
}

func load(url, clients, seconds string) error {
	n, err := strconv.Atoi(clients)
	if err != nil {
		return err
	}
	s, err := strconv.Atoi(seconds)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var took []time.Duration
	failed := 0
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
					failed++
				} else {
					took = append(took, time.Since(at))
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	el := time.Since(begin)
	if len(took) == 0 {
		return fmt.Errorf("no request of %d was answered", failed)
	}
	slices.Sort(took)
	at := func(p float64) float64 { return float64(took[int(p*float64(len(took)-1))].Microseconds()) / 1000 }
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"requests_per_second": float64(len(took)) / el.Seconds(), "p50_ms": at(0.5), "p99_ms": at(0.99), "failed": failed,
	})
}
