# One gondola fleet as a Nomad job. Hosts that have /dev/kvm say so in their client
# configuration: meta { kvm = "true" }.
job "gondola-web" {
  type = "service"

  constraint {
    attribute = "${meta.kvm}"
    value     = "true"
  }

  group "web" {
    count = 2

    network {
      port "metrics" {}
      port "http" { to = 8080 }
    }

    task "fleet" {
      driver       = "raw_exec"
      kill_signal  = "SIGTERM"
      kill_timeout = "30s"

      config {
        command = "/usr/local/bin/gondola"
        args    = ["fleet", "up", "--metrics", "127.0.0.1:${NOMAD_PORT_metrics}", "local/fleet.yaml"]
      }

      env {
        XDG_RUNTIME_DIR = "${NOMAD_TASK_DIR}/run"
      }

      template {
        destination = "local/fleet.yaml"
        data        = <<EOT
isolation: library
machines:
  web:
    memory: 256M
    memory-min: 128M
    net: user
    ports: ["127.0.0.1:${NOMAD_PORT_http}:80"]
    command: httpd -f -p 80
EOT
      }

      resources {
        cpu        = 500 # MHz
        memory     = 160
        memory_max = 320
      }
    }
  }
}
